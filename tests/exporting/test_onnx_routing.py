"""Routings beyond the plain softmax, and layers that differ, against transformers: exact in float32, handed over to QMoE."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from moe_edge.contracts.capabilities import refusals
from moe_edge.contracts.errors import InputRejected
from moe_edge.exporting.imatrix import Importance
from moe_edge.exporting.onnx import export_onnx
from moe_edge.exporting.onnx_graph import build_graph, write_companions
from moe_edge.exporting.onnx_pack import Packer, WeightRecipe
from moe_edge.models.loading import load_model
from moe_edge.models.views import MoELayerView, moe_layers
from tests.exporting.onnx_models import (
    MAX_DIFFERENCE,
    PROMPT,
    hf_logits,
    initializers,
    ort_logits,
    spec_of,
    with_stored_weights,
)
from tests.tiny import tiny_checkpoint

GROUPS = {"experts": 8, "n_group": 4, "topk_group": 2, "head_dim": 32, "layers": 3}
ROUTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "groups": ("glm4_moe", GROUPS),
    "groups, weights kept": ("glm4_moe", {**GROUPS, "norm_topk_prob": False}),
    "sigmoids kept": ("lfm2_moe", {"norm_topk_prob": False, "layers": 3}),
    "sigmoids without a bias": ("lfm2_moe", {"use_expert_bias": False, "layers": 3}),
    "softmax kept": ("qwen3_moe", {"norm_topk_prob": False}),
    "softmax renormalised": ("qwen2_moe", {"norm_topk_prob": True}),
}


@torch.no_grad()
def logits_by(model: PreTrainedModel) -> np.ndarray:
    return model(torch.from_numpy(PROMPT)[None]).logits[0].numpy()


@pytest.mark.parametrize("name", ROUTINGS)
@torch.no_grad()
def test_every_routing_is_exact_and_stays_so_with_quantized_experts(name: str, tmp_path: Path) -> None:
    family, options = ROUTINGS[name]
    checkpoint = tiny_checkpoint(tmp_path, family, **options)
    floating = export_onnx(checkpoint, tmp_path / "fp32", precision="fp32")
    assert np.abs(ort_logits(tmp_path / "fp32") - hf_logits(checkpoint)).max() <= MAX_DIFFERENCE
    quantized = export_onnx(checkpoint, tmp_path / "int4", precision="int4", accuracy_level=0)
    stored = with_stored_weights(load_model(checkpoint), initializers(tmp_path / "int4"))
    assert np.abs(ort_logits(tmp_path / "int4") - logits_by(stored)).max() <= MAX_DIFFERENCE
    masked = "softmax" not in name  # QMoE reads gates, not masked logits: what computes those is gone
    assert ("ScatterElements" in floating["nodes"]) is masked
    assert ("ScatterElements" in quantized["nodes"]) is ("groups" in name) and "Log" not in quantized["nodes"]


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "phimoe"])
def test_what_onnx_runtime_cannot_compute_is_refused_with_its_reason(family: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, family)
    reason = refusals("ort", spec_of(checkpoint))[0]
    with pytest.raises(InputRejected) as caught:
        export_onnx(checkpoint, tmp_path / "onnx", precision="fp32")
    assert reason in str(caught.value) and ("latent" in reason) is (family != "phimoe")
    assert not (tmp_path / "onnx").exists()


def test_a_rotation_that_the_kernel_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match="multiple of 16 columns"):
        export_onnx(tiny_checkpoint(tmp_path, "glm4_moe", head_dim=16), tmp_path / "onnx", precision="fp32")


@torch.no_grad()
def shrink(view: MoELayerView, experts: int, width: int, top_k: int) -> None:
    """Keep a layer's first experts, neurons and choices."""
    view.router.weight = nn.Parameter(view.router.weight[:experts].clone())
    gate_up, down = view.experts.gate_up_proj[:experts], view.experts.down_proj[:experts]
    gate, up = gate_up.chunk(2, dim=1)
    view.experts.gate_up_proj = nn.Parameter(torch.cat([gate[:, :width], up[:, :width]], 1).clone())
    view.experts.down_proj = nn.Parameter(down[:, :, :width].clone())
    view.experts.num_experts = view.router.num_experts = experts
    view.router.top_k = top_k


def uneven(checkpoint: Path) -> PreTrainedModel:
    model = load_model(checkpoint)
    model.set_experts_implementation("eager")
    for view, sizes in zip(moe_layers(model), [(6, 32, 2), (3, 64, 1), (5, 16, 3)], strict=True):
        shrink(view, *sizes)
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
@torch.no_grad()
def test_layers_may_differ_in_experts_width_and_top_k(family: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, family, layers=3, width=64)
    for precision in ("fp32", "int4"):
        folder, model = tmp_path / precision, uneven(checkpoint)
        (folder / "work").mkdir(parents=True)
        builder = build_graph(model, spec_of(checkpoint), checkpoint, folder / "work")
        Packer(builder.model, WeightRecipe(precision, accuracy_level=0), Importance(None)).run()
        ir.save(builder.model, folder / "model.onnx", external_data="model.onnx.data")
        write_companions(builder, checkpoint, folder)
        if precision == "int4":
            with_stored_weights(model, initializers(folder))
        assert np.abs(ort_logits(folder) - logits_by(model)).max() <= MAX_DIFFERENCE, precision
