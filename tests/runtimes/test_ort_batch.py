"""ONNX Runtime side by side: the tokens of one prompt at a time, whatever the neighbours' lengths; ended rows cost nothing."""

from pathlib import Path

import numpy as np
import pytest

from moe_edge.contracts.errors import ConfigError
from moe_edge.exporting.onnx import export_onnx
from moe_edge.runtimes import ort_batch
from moe_edge.runtimes.base import generate
from moe_edge.runtimes.ort import OrtRuntime
from moe_edge.runtimes.sampling import GREEDY, RowNoise
from tests.exporting.onnx_models import case
from tests.runtimes.test_generation import PROMPTS, WARM

NEW = 12


def exported(tmp_path: Path, family: str, precision: str = "fp32") -> Path:
    export_onnx(case(tmp_path, family), tmp_path / "onnx", precision=precision)
    return tmp_path / "onnx"


@pytest.mark.parametrize(
    ("family", "precision"),
    [("qwen3_moe", "fp32"), ("qwen3_moe", "int4"), ("gpt_oss", "fp32"), ("lfm2_moe", "fp32")],
)
def test_side_by_side_equals_one_by_one(tmp_path: Path, family: str, precision: str) -> None:
    with OrtRuntime(exported(tmp_path, family, precision), 1, 64) as runtime:
        for sampling in (GREEDY, WARM):
            alone = [generate(runtime, p.ids, NEW, (), sampling, RowNoise(p.seed, p.row)) for p in PROMPTS]
            assert runtime.generate_batch(PROMPTS, NEW, (), sampling) == alone
        assert alone[1] != alone[3] and all(len(tokens) == NEW for tokens in alone)
        stops = {alone[1][4], alone[2][7]}
        expected = [tokens[: next((i for i, t in enumerate(tokens) if t in stops), NEW)] for tokens in alone]
        assert runtime.generate_batch(PROMPTS, NEW, stops, WARM) == expected
        assert min(map(len, expected)) < NEW


def test_rows_run_together_and_leave_when_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = ort_batch._Batch.step

    def counted(batch: ort_batch._Batch, tokens: list[int]) -> np.ndarray:
        sizes.append(len(tokens))
        return step(batch, tokens)

    monkeypatch.setattr(ort_batch._Batch, "step", counted)
    with OrtRuntime(exported(tmp_path, "qwen3_moe"), 1, 64) as runtime:
        answers = runtime.generate_batch(PROMPTS, NEW, (), GREEDY)
        assert sizes == [len(PROMPTS)] * (NEW - 1)
        sizes.clear()
        runtime.generate_batch(PROMPTS, NEW, {answers[0][3]}, GREEDY)
        assert sizes == sorted(sizes, reverse=True) and sizes[0] == len(PROMPTS) > sizes[-1]


def test_what_does_not_fit_is_refused_and_the_context_is_not_a_rows(tmp_path: Path) -> None:
    with OrtRuntime(exported(tmp_path, "qwen3_moe"), 1, 16) as runtime:
        with pytest.raises(ConfigError, match="limit 16"):
            runtime.generate_batch(PROMPTS, 8, (), GREEDY)
        assert runtime.generate_batch(PROMPTS[:1], 0, (), GREEDY) == [[]]
        assert runtime.generate_batch([], 8, (), GREEDY) == []
        assert len(runtime.generate_batch(PROMPTS[:1], 11, (), GREEDY)[0]) == 11
        with pytest.raises(ConfigError, match="prefill first"):
            runtime.step(3)
