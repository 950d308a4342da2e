"""On a trained model, the search with an importance matrix loses less than round-to-nearest, on text that it did not see."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_edge.demo import demo_teacher_path
from moe_edge.exporting.onnx import export_onnx
from moe_edge.exporting.onnx_quantize import Scheme
from moe_edge.models.loading import load_model, load_tokenizer
from moe_edge.profiling.passes import run_pass, share_of
from moe_edge.profiling.sums import to_statistics
from moe_edge.runtimes.hf import HfRuntime
from moe_edge.runtimes.ort import OrtRuntime
from moe_edge.texts.rows import heldout_rows
from tests.exporting.onnx_models import kl_nats

MODEL = demo_teacher_path()


@pytest.fixture(scope="module")
def rows_NS() -> np.ndarray:
    return heldout_rows("default", load_tokenizer(MODEL), 3072, 128).ids_NS.astype(np.int32)


@pytest.fixture(scope="module")
def imatrix(rows_NS: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    work = share_of(rows_NS[:12], 0)
    sums = run_pass(load_model(MODEL), work, partial=tmp_path_factory.mktemp("pass"), identity={})
    return to_statistics(sums, {}).imatrix


@pytest.fixture(scope="module")
def expected(rows_NS: np.ndarray) -> list[np.ndarray]:
    with HfRuntime(MODEL, 1, 128) as runtime:
        return [runtime.logits(ids_S) for ids_S in rows_NS[12:]]


def test_the_search_costs_less_kl_than_round_to_nearest(
    rows_NS: np.ndarray, imatrix: dict[str, torch.Tensor], expected: list[np.ndarray], tmp_path: Path
) -> None:
    lost: dict[Scheme, float] = {}
    schemes: tuple[Scheme, ...] = ("rtn", "search")
    for scheme in schemes:
        folder = tmp_path / scheme
        export_onnx(MODEL, folder, precision="int4", block_size=128, scheme=scheme, imatrix=imatrix, accuracy_level=0)
        with OrtRuntime(folder, 1, 128) as runtime:
            pairs = zip(expected, (runtime.logits(ids_S) for ids_S in rows_NS[12:]), strict=True)
            lost[scheme] = float(np.mean([kl_nats(reference, logits) for reference, logits in pairs]))
    assert 0 < lost["search"] < 0.95 * lost["rtn"]
