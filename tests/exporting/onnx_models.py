"""Models, expectations and readers for the tests of the ONNX export."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from moe_edge.contracts.spec import ModelSpec
from moe_edge.families import family_of
from moe_edge.families.declared import Names
from moe_edge.models.views import MoELayerView, moe_layers
from moe_edge.runtimes.hf import HfRuntime
from moe_edge.runtimes.ort import OrtRuntime
from tests.tiny import FAMILY_NAMES, tiny_checkpoint, tiny_ids

PROMPT = tiny_ids(tokens=20, rows=1)[0].numpy()
MAX_DIFFERENCE = 1e-4
# A seed without a token whose experts tie: rounding weights to float16 flips its routing.
CASES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(FAMILY_NAMES, {}),
    "granitemoe": {},
    "granitemoeshared": {},
    "ernie4_5_moe": {},
    "gpt_oss": {"seed": 3},
    "lfm2_moe": {"layers": 3},
    "glm4_moe": {"head_dim": 32},
    "minimax_m2": {},
}


def case(tmp_path: Path, family: str, **kwargs: Any) -> Path:
    return tiny_checkpoint(tmp_path, family, **(CASES[family] | kwargs))


def spec_of(checkpoint: Path) -> ModelSpec:
    config = json.loads((checkpoint / "config.json").read_text())
    return family_of(config).spec(config)


def hf_logits(checkpoint: Path, ids_S: np.ndarray = PROMPT) -> np.ndarray:
    with HfRuntime(checkpoint, threads=1, context_length=256) as runtime:
        return runtime.logits(ids_S)


def ort_logits(folder: Path) -> np.ndarray:
    with OrtRuntime(folder, threads=1, context_length=256) as runtime:
        return runtime.logits(PROMPT)


def genai_greedy(folder: Path, tokens: int) -> list[int]:
    """What onnxruntime-genai answers to the prompt."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(PROMPT) + tokens, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(PROMPT.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0))[len(PROMPT) :]


def kl_nats(reference_SV: np.ndarray, other_SV: np.ndarray) -> float:
    p, q = (torch.log_softmax(torch.from_numpy(a).double(), -1) for a in (reference_SV, other_SV))
    return float((p.exp() * (p - q)).sum(-1).mean())


def initializers(folder: Path) -> dict[str, np.ndarray]:
    model = onnx.load(folder / "model.onnx")
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def _dequantized(weights: dict[str, np.ndarray], name: str, bits: int) -> torch.Tensor:
    """The numbers that codes, scales and zero points of a weight stand for, [..., rows, columns]."""
    codes, scale, zero = (weights[f"{name}_{part}"] for part in (f"Q{bits}", "scale", "zp"))
    flat = codes.reshape(*scale.shape[:-1], -1)
    if bits == 4:
        flat, zero = (np.stack([a & 15, a >> 4], -1).reshape(*a.shape[:-1], -1) for a in (flat, zero))
    blocks = flat.reshape(*scale.shape, -1).astype(np.float32)
    zero = zero[..., : scale.shape[-1], None].astype(np.float32)
    return torch.from_numpy(((blocks - zero) * scale[..., None].astype(np.float32)).reshape(flat.shape))


def with_stored_weights(model: Any, weights: dict[str, np.ndarray]) -> Any:
    """Put what the int4 artifact stores back into the Hugging Face model."""
    views = {view.index: view for view in moe_layers(model)}
    names = family_of(model.config.to_dict()).in_memory
    for index, layer in enumerate(model.model.layers):
        base = f"model.layers.{index}"
        _store_mixer(layer, weights, base)
        view = views.get(index)
        if view is not None:
            _store_experts(view, weights, f"{base}.moe")
        block = getattr(layer, names.block) if view is None else view.shared
        if block is not None:
            plain = [
                _dequantized(weights, f"{base}.mlp.{name}_proj.MatMul.weight", 8) for name in ("gate", "up", "down")
            ]
            for matrix, stored in zip(_matrices(block, names), _as_stored(block, plain), strict=True):
                matrix.copy_(stored)
    model.lm_head.weight.copy_(_dequantized(weights, "lm_head.MatMul.weight", 8))
    model.model.embed_tokens.weight.copy_(_dequantized(weights, "model.embed_tokens.weight", 8))
    return model


def _store_mixer(layer: Any, weights: dict[str, np.ndarray], base: str) -> None:
    if hasattr(layer, "conv"):
        layer.conv.in_proj.weight.copy_(_dequantized(weights, f"{base}.conv.in_proj.MatMul.weight", 8))
        layer.conv.out_proj.weight.copy_(_dequantized(weights, f"{base}.conv.out_proj.MatMul.weight", 8))
        return
    attention = layer.self_attn
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    rows = [part.weight.shape[0] for part in parts]
    packed = _dequantized(weights, f"{base}.attn.qkv_proj.MatMul.weight", 8).split(rows)
    for part, stored in zip(parts, packed, strict=True):
        part.weight.copy_(stored)
    output = attention.out_proj if hasattr(attention, "out_proj") else attention.o_proj
    output.weight.copy_(_dequantized(weights, f"{base}.attn.o_proj.MatMul.weight", 8))


def _store_experts(view: MoELayerView, weights: dict[str, np.ndarray], base: str) -> None:
    gate_up, down = (_dequantized(weights, f"{base}.{part}.weight", 4) for part in ("gate_up", "down"))
    if view.experts.__class__.__name__ == "GptOssExperts":
        view.experts.gate_up_proj.copy_(gate_up.transpose(1, 2))
        view.experts.down_proj.copy_(down.transpose(1, 2))
    else:
        view.experts.gate_up_proj.copy_(torch.cat([gate_up[:, 0::2], gate_up[:, 1::2]], 1))
        view.experts.down_proj.copy_(down)


def _matrices(block: Any, names: Names) -> list[torch.Tensor]:
    fused = hasattr(block, "input_linear")
    parts = ("input_linear", "output_linear") if fused else (names.gate, names.up, names.down)
    return [getattr(block, name).weight for name in parts]


def _as_stored(block: Any, plain: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat(plain[:2]), plain[2]] if hasattr(block, "input_linear") else plain
