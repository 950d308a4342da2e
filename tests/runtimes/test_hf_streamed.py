"""A student read layer by layer says what the whole one says, of many rows at once; a model too large for memory is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_edge.contracts.errors import ConfigError, ResourceProblem
from moe_edge.formulas.ffn import Ffn
from moe_edge.models import streaming
from moe_edge.models.dense import build_dense
from moe_edge.models.loading import save_student
from moe_edge.models.routing import routing_gap
from moe_edge.models.views import moe_layers
from moe_edge.runtimes import hf, hf_batch, hf_streamed, open_runtime
from moe_edge.runtimes.hf import HfRuntime
from moe_edge.runtimes.hf_streamed import StreamedStudent, open_student
from tests.tiny import ALL_FAMILIES, tiny_checkpoint, tiny_model

ROWS = [np.random.default_rng(n).integers(3, 250, length) for n, length in enumerate((20, 4, 4, 9, 4))]


def checkpoint(tmp_path: Path, family: str) -> Path:
    if family != "dense":
        return tiny_checkpoint(tmp_path, family, layers=3)
    generator = torch.Generator().manual_seed(0)
    networks = [
        Ffn(*(0.2 * torch.randn(*shape, generator=generator) for shape in [(96, 64), (96, 64), (64, 96)]))
        for _ in range(2)
    ]
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe", name="teacher")
    save_student(build_dense(tiny_model("qwen3_moe", vocab=300), networks), teacher, tmp_path / "student")
    return tmp_path / "student"


@pytest.mark.parametrize("family", [*ALL_FAMILIES, "dense"])
def test_layer_by_layer_it_is_the_whole_student(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_batch, "BATCH_TOKENS", 8)  # two of the short rows, then one
    folder = checkpoint(tmp_path, family)
    with HfRuntime(folder, 1, 64) as whole, StreamedStudent(folder, 1, 64) as streamed:
        assert whole.vocab == streamed.vocab
        for ours, theirs in zip(streamed.routing_gaps(ROWS), whole.routing_gaps(ROWS), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
        for ids_S in [*ROWS, ROWS[0][:7]]:  # the last one was not read before
            np.testing.assert_allclose(streamed.logits(ids_S), whole.logits(ids_S), rtol=0, atol=1e-5)


def test_gaps_are_the_smallest_over_the_layers(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "olmoe", layers=3)
    with HfRuntime(folder, 1, 64) as runtime:
        found, model, gaps = runtime.routing_gaps(ROWS[:1]), runtime._open_model(), []
        for view in moe_layers(model):
            view.experts.register_forward_pre_hook(
                lambda _, inputs, view=view: gaps.append(routing_gap(view, inputs[0]))
            )
        runtime.logits(ROWS[0])
    np.testing.assert_allclose(found[0], torch.stack(gaps).amin(0).numpy(), rtol=0, atol=1e-6)


def test_the_checkpoint_is_read_once_for_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = streaming.StreamedModel._load
    monkeypatch.setattr(streaming.StreamedModel, "_load", lambda self, part: (loaded.append(part), load(self, part)))
    with StreamedStudent(tiny_checkpoint(tmp_path, "mixtral", layers=3), 1, 64) as student:
        student.routing_gaps(ROWS)
        for ids_S in ROWS:
            student.logits(ids_S)
        assert loaded == ["rest", "embedding", 0, 1, 2, "head"]
        held = [name for name, values in student._model.model.named_parameters() if not values.is_meta]
        assert held == ["model.norm.weight", "lm_head.weight"]


def test_rows_are_checked_and_threads_come_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with StreamedStudent(tiny_checkpoint(tmp_path, "mixtral"), before + 1, 8) as student:
        assert torch.get_num_threads() == before + 1
        with pytest.raises(ConfigError, match="do not fit"):
            student.routing_gaps([ROWS[0]])
        with pytest.raises(ConfigError, match="outside the vocabulary"):
            student.logits(np.array([100000]))
    assert torch.get_num_threads() == before


def test_what_does_not_fit_is_streamed_as_a_reference_and_refused_as_a_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen3_moe")
    with open_student(folder, 1, 64) as student:
        assert isinstance(student, HfRuntime)
    monkeypatch.setattr(hf_streamed, "fits_in_memory", lambda *given, **more: False)
    with open_student(folder, 1, 64) as student:
        assert isinstance(student, StreamedStudent)
    monkeypatch.setattr(hf, "fits_in_memory", lambda *given, **more: False)
    with pytest.raises(
        ResourceProblem, match=r"(?s)not measured: the model does not fit into memory.*in float32.*are free"
    ):
        open_runtime("hf", folder, threads=1, context_length=64)
