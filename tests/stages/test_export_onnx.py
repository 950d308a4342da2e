"""The export stage's ONNX part: bits per layer, the folder for CUDA, and dense students, judged against the student."""

from pathlib import Path

import pytest
import torch

from moe_edge.contracts.errors import ConfigError, MoeEdgeError
from moe_edge.exporting import onnx_files, onnx_pack
from moe_edge.exporting.onnx import export_onnx
from moe_edge.formulas.ffn import Ffn
from moe_edge.models.dense import build_dense
from moe_edge.models.loading import save_student
from moe_edge.stages import export as stage
from tests.exporting.onnx_models import initializers
from tests.planning.plan_helpers import config
from tests.tiny import tiny_checkpoint, tiny_model

ONNX = "export.formats=[onnx]"


def job(model: Path, out: Path, *settings: str):
    return stage.plan_job(
        config(*settings), model, out, main="Q4_K_M", precision="int4", statistics=None, kept=None, provenance={}
    )


def dense_student(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 64), (96, 64), (64, 96)]
    networks = [Ffn(*(0.2 * torch.randn(*shape, generator=generator) for shape in shapes)) for _ in range(2)]
    model = build_dense(tiny_model("qwen3_moe", vocab=300), networks)
    save_student(model, tiny_checkpoint(tmp_path, "qwen3_moe", name="teacher"), tmp_path / "student")
    return tmp_path / "student"


def test_bits_per_layer_and_cuda_reach_the_files(tmp_path):
    model, out = tiny_checkpoint(tmp_path, "qwen3_moe"), tmp_path / "out"
    settings = ("export.onnx.layer_bits={expert@1-1: 8}", "export.onnx.provider=cuda")
    result = stage.export_model(job(model, out, ONNX, *settings))
    assert [row.quantization for row in result.artifacts] == ["int4-mix"]
    assert [row["artifact"] for row in result.parity] == ["onnx fp32", "onnx int4-mix delivered"]
    assert result.parity[0]["passed"] and "experimental" in result.notes[0]
    row = result.artifacts[0]
    assert row.bytes_by_class.keys() == row.bits_per_weight_by_class.keys() >= {"expert", "attention"}
    assert 0 < sum(row.bytes_by_class.values()) < row.bytes and row.bits_per_weight_by_class["expert"] > 6
    assert stage.export_model(job(model, out, ONNX, *settings)).artifacts == [row], "a second run tells the same"
    for folder in (out / "onnx", out / "onnx" / "cuda"):
        names = initializers(folder).keys()
        assert {"model.layers.0.moe.down.weight_Q4", "model.layers.1.moe.down.weight_Q8"} <= names
    reference = initializers(out / "reference" / "onnx-fp32")
    assert "model.layers.1.moe.down.weight" in reference, "what parity is judged on is not quantized"


def test_without_cuda_there_is_one_folder_and_an_absent_layer_is_refused(tmp_path):
    model = tiny_checkpoint(tmp_path, "mixtral")
    stage.export_model(job(model, tmp_path / "out", ONNX))
    assert not (tmp_path / "out" / "onnx" / "cuda").exists()
    with pytest.raises(ConfigError, match="expert@1-2"):
        stage.export_model(job(model, tmp_path / "other", ONNX, "export.onnx.layer_bits={expert@1-2: 8}"))


def test_a_dense_student_is_exported_and_judged(tmp_path):
    result = stage.export_model(job(dense_student(tmp_path), tmp_path / "out", ONNX))
    assert [row.format for row in result.artifacts] == ["onnx"] and result.name.endswith("-dense")
    assert result.parity[0]["passed"]


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_experts_that_stay_float_fail_the_export(tmp_path, monkeypatch, provider):
    """In the graph for the CPU and, where only that one goes wrong, in the one for CUDA."""
    rule_of, made = onnx_pack.rule_of, []

    def forgetful(name):
        wrong = name.endswith("layers.1/moe/MoE") and len(made) == (3 if provider == "cuda" else 2)
        return None if wrong else rule_of(name)

    def counted(*given, **options):
        made.append(given)
        return export_onnx(*given, **options)

    monkeypatch.setattr(onnx_pack, "rule_of", forgetful)
    monkeypatch.setattr(onnx_files, "export_onnx", counted)
    model = tiny_checkpoint(tmp_path, "qwen3_moe")
    with pytest.raises(MoeEdgeError, match="expert of layer 1 is stored in (32|16) bits, asked for were 4"):
        stage.export_model(job(model, tmp_path / "out", ONNX, "export.onnx.provider=cuda"))
    assert len(made) == (3 if provider == "cuda" else 2)
