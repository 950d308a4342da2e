"""The export's gate where memory is short: a student read layer by layer, a float32 graph of the first layers only."""

from math import prod
from pathlib import Path

import pytest

from moe_edge.contracts.errors import GateFailed, ResourceProblem
from moe_edge.exporting import onnx as onnx_export
from moe_edge.exporting import onnx_files
from moe_edge.runtimes import hf, hf_streamed
from moe_edge.stages import export as stage
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.files import read_json
from tests.exporting.gguf_models import representable
from tests.planning.plan_helpers import config
from tests.tiny import tiny_checkpoint


def job(model: Path, out: Path, *settings: str):
    return stage.plan_job(
        config("target.context_length=64", "target.runtime.threads=1", *settings),
        model,
        out,
        main="Q8_0",
        precision="int8",
        statistics=None,
        kept=None,
        provenance={},
    )


def test_a_student_that_does_not_fit_is_judged_without_being_loaded(tmp_path, monkeypatch):
    model = representable(tmp_path, "qwen3_moe")
    settings = ("export.formats=[gguf]", "export.gguf.types=[Q8_0]")
    whole = stage.export_model(job(model, tmp_path / "whole", *settings)).parity
    monkeypatch.setattr(hf_streamed, "fits_in_memory", lambda *given, **more: False)
    monkeypatch.setattr(hf, "load_student", lambda *given: pytest.fail("the student was loaded whole"))
    streamed = stage.export_model(job(model, tmp_path / "streamed", *settings)).parity
    assert streamed[0]["passed"] and streamed[0]["rule"] == "logits, KL and greedy"
    for row, expected in zip(streamed, whole, strict=True):
        assert row["artifact"] == expected["artifact"] and row["greedy_equal"] == expected["greedy_equal"]
        assert row["clear_max_abs_logit"] == pytest.approx(expected["clear_max_abs_logit"], abs=1e-5)
        assert row["kl_nats"] == pytest.approx(expected["kl_nats"], rel=1e-2)
    golden = [read_json(tmp_path / name / "golden.json") for name in ("whole", "streamed")]
    assert golden[0]["prompts"][0]["top_ids"] == golden[1]["prompts"][0]["top_ids"]


def short_of_memory(monkeypatch, model: Path, layers: float) -> None:
    """So much free memory that the float32 graph of `layers` layers would be written."""
    tensors = inspect_checkpoint(model).tensors
    weights = {name: prod(info.shape) for name, info in tensors.items()}
    one = sum(size for name, size in weights.items() if ".layers.1." in name)
    rest = sum(size for name, size in weights.items() if ".layers." not in name)
    free = 4 * (rest + layers * one) / onnx_files.FP32_MEMORY_SHARE
    monkeypatch.setattr(onnx_files, "free_memory_bytes", lambda: free)


ONNX = "export.formats=[onnx]"


def test_of_a_large_student_the_first_layers_are_judged_in_float32_and_the_record_says_so(tmp_path, monkeypatch):
    model = tiny_checkpoint(tmp_path, "qwen3_moe", layers=4)
    short_of_memory(monkeypatch, model, layers=2.5)
    monkeypatch.setattr(hf, "fits_in_memory", lambda *given, **more: True)
    monkeypatch.setattr(hf_streamed, "fits_in_memory", lambda *given, **more: True)
    result = stage.export_model(job(model, tmp_path / "out", ONNX))
    kinds = [row["artifact"] for row in result.parity]
    assert kinds == ["onnx fp32 (the first 2 of 4 layers)", "onnx int8 delivered"]
    assert result.parity[0]["passed"] and result.parity[0]["clear_max_abs_logit"] <= 1e-4
    assert any("the first 2 of 4 layers were compared instead" in note for note in result.notes)
    assert inspect_checkpoint(tmp_path / "out" / "reference" / "first-2-layers").config["num_hidden_layers"] == 2


def test_a_wrong_graph_of_the_first_layers_fails_the_export(tmp_path, monkeypatch):
    model = tiny_checkpoint(tmp_path, "qwen3_moe", layers=4)
    short_of_memory(monkeypatch, model, layers=2.5)
    monkeypatch.setattr(hf, "fits_in_memory", lambda *given, **more: True)
    monkeypatch.setattr(hf_streamed, "fits_in_memory", lambda *given, **more: True)
    load = onnx_export.load_student

    def wrong(*given, **more):
        model = load(*given, **more)
        model.model.layers[1].mlp.experts.down_proj.data.mul_(1.05)
        return model

    monkeypatch.setattr(onnx_export, "load_student", wrong)
    with pytest.raises(GateFailed, match="the first 2 of 4 layers"):
        stage.export_model(job(model, tmp_path / "out", ONNX))


def test_without_room_for_one_layer_of_experts_the_export_is_refused(tmp_path, monkeypatch):
    model = tiny_checkpoint(tmp_path, "glm4_moe", layers=3, head_dim=32)  # its first layer is dense
    short_of_memory(monkeypatch, model, layers=0.99)
    with pytest.raises(ResourceProblem, match=r"(?s)cannot be compared with the student.*export.formats"):
        stage.export_model(job(model, tmp_path / "out", ONNX))
