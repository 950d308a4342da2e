"""A tiny gpt-oss in the layout of the released checkpoints: experts as MXFP4 blocks and scales, all else bfloat16.

Legend: E experts, R rows, C columns, G blocks of a row.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

from tests.exporting.gguf_models import REPRESENTABLE
from tests.tiny import tiny_checkpoint

SPLIT = ("gate_up_proj", "down_proj")
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def pack(weight_ECR: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [E, R, G, 16] and scales [E, R, G] of the nearest MXFP4 numbers, columns along the blocks."""
    weight_ERGX = weight_ECR.float().transpose(1, 2).unflatten(-1, (-1, 32))
    largest_ERG = weight_ERGX.abs().amax(-1).clamp_min(2.0**-100)
    exponents_ERG = largest_ERG.log2().floor().int() - 2
    scaled_ERGX = torch.ldexp(weight_ERGX, -exponents_ERG.unsqueeze(-1))
    codes_ERGX = (scaled_ERGX.unsqueeze(-1) - torch.tensor(FP4_VALUES)).abs().argmin(-1).to(torch.uint8)
    return codes_ERGX[..., 0::2] | codes_ERGX[..., 1::2] << 4, (exponents_ERG + 127).to(torch.uint8)


def released_gpt_oss(tmp_path: Path, **kwargs: Any) -> tuple[Path, Path]:
    """(the folder as OpenAI releases it, the same model in plain bfloat16 as transformers unpacks it)."""
    kwargs = REPRESENTABLE["gpt_oss"] | {"dtype": torch.bfloat16} | kwargs
    packed, plain = (tiny_checkpoint(tmp_path, "gpt_oss", name=name, **kwargs) for name in ("packed", "plain"))
    stored, unpacked = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if name.endswith(SPLIT):
            blocks, scales = pack(tensor)
            stored |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
            tensor = convert_moe_packed_tensors(blocks, scales)
        else:
            stored[name] = tensor
        unpacked[name] = tensor
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(unpacked, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text()) | {"quantization_config": QUANTIZATION}
    (packed / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return packed, plain
