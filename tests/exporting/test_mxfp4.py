"""A released gpt-oss through profile, plan, compress and export, and back into MXFP4 without loss."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

from moe_edge.api import build
from moe_edge.contracts.plan import Plan
from moe_edge.exporting.gguf import write_gguf
from moe_edge.exporting.gguf_quantize import quantize_gguf
from moe_edge.exporting.onnx import export_onnx
from moe_edge.stages import export as stage
from moe_edge.storage.checkpoint import TensorReader
from tests.exporting.onnx_models import MAX_DIFFERENCE, PROMPT, hf_logits, ort_logits
from tests.mxfp4 import released_gpt_oss
from tests.planning.plan_helpers import config

GGUF = ("export.formats=[gguf]", "target.context_length=64", "target.runtime.threads=1")


def expert_values(path: Path) -> dict[str, np.ndarray]:
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors if tensor.name.endswith("_exps.weight")}
    return {name: dequantize(tensor.data, tensor.tensor_type) for name, tensor in found.items()}


def test_the_gguf_is_that_of_the_plain_model(tmp_path: Path) -> None:
    for folder in released_gpt_oss(tmp_path):
        write_gguf(folder, folder.with_suffix(".gguf"), name="x")
    assert (tmp_path / "packed.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_it_goes_back_into_mxfp4_without_loss(tmp_path: Path) -> None:
    packed, _ = released_gpt_oss(tmp_path)
    weights = load_file(packed / "model.safetensors")
    for name in [
        name for name in weights if name.endswith("blocks")
    ]:  # any codes, those of a block not the largest ones, too
        codes = torch.randint(
            0, 256, weights[name].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        weights[name] = torch.where(torch.arange(len(codes)).view(-1, 1, 1, 1) % 2 == 0, codes, codes & 0b10111011)
    save_file(weights, packed / "model.safetensors", metadata={"format": "pt"})
    write_gguf(packed, tmp_path / "f16.gguf", name="x")
    types = quantize_gguf(tmp_path / "f16.gguf", tmp_path / "mxfp4.gguf", "MXFP4", None, 1)
    wanted, found = (expert_values(tmp_path / name) for name in ("f16.gguf", "mxfp4.gguf"))
    assert {types[name] for name in found} == {"MXFP4"} and len(found) == 6
    assert all(np.array_equal(found[name], values) and values.any() for name, values in wanted.items())


def test_its_export_passes_the_parity_gate(tmp_path: Path) -> None:
    packed, _ = released_gpt_oss(tmp_path)
    settings = config(*GGUF, "export.gguf.types=[MXFP4]")
    job = stage.plan_job(
        settings, packed, tmp_path / "out", main="MXFP4", precision="int4", statistics=None, kept=None, provenance={}
    )
    result = stage.export_model(job)
    assert result.parity[0]["artifact"] == "gguf F16" and result.parity[0]["passed"]
    assert [row.quantization for row in result.artifacts] == ["MXFP4"]


def test_onnx_computes_the_plain_model(tmp_path: Path) -> None:
    packed, plain = released_gpt_oss(tmp_path)
    export_onnx(packed, tmp_path / "onnx", precision="fp32")
    assert np.abs(ort_logits(tmp_path / "onnx") - hf_logits(plain, PROMPT)).max() <= MAX_DIFFERENCE
    assert "quantization_config" not in json.loads((tmp_path / "onnx" / "config.json").read_text())


@pytest.mark.parametrize("mode", ["whole", "layerwise"])
def test_it_is_profiled_planned_and_pruned(tmp_path: Path, mode: str) -> None:
    packed, plain = released_gpt_oss(tmp_path)
    settings = (
        f"profile.mode={mode}",
        "plan.compensate=false",
        "plan.experts=4",
        "plan.tokens=128",
        "profile.cka_tokens=128",
        "calibration.tokens=320",
        "calibration.sequence_length=32",
        "export.formats=[gguf]",
    )
    build(packed, out=tmp_path / "run", settings=settings, until="compress")
    plan = Plan.read(tmp_path / "run" / "plan" / "plan.json")
    assert plan.experts_kept == 4
    student, teacher = TensorReader(tmp_path / "run" / "compress" / "model"), TensorReader(plain)
    for layer, kept in plan.kept.items():
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        assert torch.equal(student.get(name), teacher.get(name)[kept])
    assert not student.headers.packed and "quantization_config" not in student.headers.config
