"""MXFP4 experts, as gpt-oss is released, read as the bfloat16 tensors that they stand for.

Such a checkpoint holds an expert matrix as two tensors: `NAME_blocks`, two four-bit numbers per byte, and `NAME_scales`, one
exponent for each 32 numbers of a row (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
The rest of the package never sees them: the headers name one tensor NAME, in the shape, order and dtype in which transformers
loads it (`convert_moe_packed_tensors`), and every reader unpacks it, one expert at a time. Bfloat16 holds each value exactly.

Shape suffixes: E experts, R rows, G blocks of a row, B bytes of a block, X its numbers (2B), C columns (2GB).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_edge.contracts.checkpoint import Packed, TensorInfo
from moe_edge.contracts.errors import InputRejected
from moe_edge.storage.safetensors_header import DTYPE_BYTES

MODEL_TYPES = ("gpt_oss",)  # whose matrices transformers stores in this form, transposed
BLOCKS, SCALES = "_blocks", "_scales"
BLOCK_BYTES = 16
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1; the fourth bit is the sign
_VALUES = torch.tensor((*_MAGNITUDES, *(-value for value in _MAGNITUDES)), dtype=torch.bfloat16)
# The two values of each byte, low half first, side by side in one integer: half as many look-ups. [256]
_PAIRS = torch.stack([_VALUES.repeat(16), _VALUES.repeat_interleave(16)], dim=1).view(torch.int32).flatten()


def is_mxfp4(config: dict[str, Any]) -> bool:
    """Does a config.json announce experts in this form, of a model that is known to have them?"""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or config.get("model_type") not in MODEL_TYPES:
        return False
    return quantization.get("quant_method") == "mxfp4"


def unpacked(tensors: dict[str, TensorInfo], folder: Path) -> dict[str, TensorInfo]:
    """The same tensors with every pair of blocks and scales replaced by the tensor that it stands for.

    Raises:
        InputRejected: a pair is incomplete, its parts do not fit together, or its name is taken.
    """
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name.endswith(BLOCKS):
            whole = _whole(name.removesuffix(BLOCKS), tensors, folder)
            found[whole.name] = whole
        elif not name.endswith(SCALES):
            found[name] = info
        elif name.removesuffix(SCALES) + BLOCKS not in tensors:
            raise _unfit(folder, name, "scales without blocks")
    return found


def _whole(name: str, tensors: dict[str, TensorInfo], folder: Path) -> TensorInfo:
    blocks, scales = tensors[name + BLOCKS], tensors.get(name + SCALES)
    if scales is None or name in tensors:
        raise _unfit(folder, blocks.name, "blocks without scales" if scales is None else f"{name} is there as well")
    fits = len(blocks.shape) == 4 and blocks.shape[3] == BLOCK_BYTES and scales.shape == blocks.shape[:3]
    if not fits or (blocks.dtype, scales.dtype) != ("U8", "U8"):
        why = f"blocks {blocks.dtype} {list(blocks.shape)}, scales {scales.dtype} {list(scales.shape)}"
        raise _unfit(folder, blocks.name, f"{why}; expected U8 [E, R, G, {BLOCK_BYTES}] and U8 [E, R, G]")
    experts, rows, groups, size = blocks.shape
    shape = (experts, 2 * groups * size, rows)
    bytes_ = 2 * blocks.bytes * DTYPE_BYTES["BF16"]
    return replace(blocks, name=name, dtype="BF16", shape=shape, bytes=bytes_, packed=Packed(blocks, scales))


def _unfit(folder: Path, name: str, why: str) -> InputRejected:
    return InputRejected("an MXFP4 tensor cannot be read", where=f"{folder}: {name}", why=why)


def dequantize(blocks_ERGB: Tensor, scales_ERG: Tensor) -> Tensor:
    """The values of packed experts in bfloat16, rows and columns exchanged as transformers does. [E, C, R]"""
    experts, rows, groups, size = blocks_ERGB.shape
    out_ECR = torch.empty(experts, 2 * groups * size, rows, dtype=torch.bfloat16)
    for out_CR, blocks_RGB, scales_RG in zip(out_ECR, blocks_ERGB, scales_ERG, strict=True):
        pairs_RGB = _PAIRS.index_select(0, blocks_RGB.flatten().int()).view(blocks_RGB.shape)
        exponents_RG = scales_RG.int() - 127
        values_RGX = torch.ldexp(pairs_RGB.view(torch.bfloat16), exponents_RG.unsqueeze(-1))
        out_CR.copy_(values_RGX.flatten(1).T)
    return out_ECR
