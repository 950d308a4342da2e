"""The export stage's ONNX part: bits per layer, the folder for CUDA, and dense students, judged against the student."""

from pathlib import Path

import pytest
import torch

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.families.dense import build_dense
from moe_edge.families.loading import save_student
from moe_edge.formulas.ffn import Ffn
from moe_edge.stages import export as stage
from tests.compression.plan_helpers import config
from tests.export.onnx_models import initializers
from tests.tiny import tiny_checkpoint, tiny_model

ONNX = "export.formats=[onnx]"


def job(model: Path, out: Path, *settings: str, statistics=None) -> stage.Job:
    return stage.plan_job(
        config(*settings), model, out, main="Q4_K_M", precision="int4", statistics=statistics, kept=None, provenance={}
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
    assert [row["quantization"] for row in result["artifacts"]] == ["int4-mix"]
    assert [row["artifact"] for row in result["parity"]] == ["onnx fp32", "onnx int4-mix delivered"]
    assert result["parity"][0]["passed"] and "experimental" in result["notes"][0]
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


def test_a_dense_student_is_exported_as_onnx_and_its_missing_gguf_is_told(tmp_path):
    student = dense_student(tmp_path)
    result = stage.export_model(job(student, tmp_path / "out"))
    assert [row["format"] for row in result["artifacts"]] == ["onnx"] and result["name"].endswith("-dense")
    assert result["parity"][0]["passed"] and "no GGUF" in result["notes"][0]
    with pytest.raises(InputRejected, match="GGUF") as caught:
        job(student, tmp_path / "out", "export.formats=[gguf]")
    assert "export.formats=[onnx]" in str(caught.value)


def test_a_dense_student_reads_what_the_teachers_blocks_read(tmp_path):
    """The blocks' inputs are weighted as the teacher's were; what described experts is left out."""
    imatrix = {
        "attention_in": torch.ones(2, 64), "ffn_in": torch.rand(2, 64) ** 4 * 100, "shared_down": torch.ones(2, 48),
        "expert_in": torch.ones(2, 6, 64), "expert_down": torch.ones(2, 6, 32), "dense_count": torch.tensor(100.0),
    }  # fmt: skip
    left = stage._of_dense(imatrix)
    assert left.keys() == {"attention_in", "dense_count", "dense_in"} and left["dense_in"] is imatrix["ffn_in"]

    class Told:
        pass

    Told.imatrix = left
    student, changed = dense_student(tmp_path), {}
    for name, statistics in (("plain", None), ("weighted", Told)):
        stage._export_onnx(job(student, tmp_path / name, ONNX, statistics=statistics), [], [], [])
        changed[name] = initializers(tmp_path / name / "onnx")
    differ = {name for name in changed["plain"] if (changed["plain"][name] != changed["weighted"][name]).any()}
    assert differ and all("mlp.gate_proj" in name or "mlp.up_proj" in name for name in differ)
