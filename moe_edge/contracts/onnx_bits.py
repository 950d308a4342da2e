"""Which bits every tensor gets in an ONNX export, and the bytes that makes: one table for exporter and planner.

The routed experts are most of a Mixture-of-Experts model's bytes, so "int4" spends four bits there; attention, shared
experts, head and embedding are read for every token, are a few per cent of a large model and cost most quality per byte
saved, so they keep eight. In a dense model the feed-forward blocks are the bulk and take the experts' bits. Routers, norms,
biases and convolution kernels always stay in float32: a flipped routing decision is no rounding error.

Quantized rows are cut into blocks with one float16 scale and one zero point of as many bits as a weight each; zero points
of a row fill whole bytes.
"""

import re
from collections.abc import Mapping
from math import prod
from typing import Literal, NamedTuple

from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.quantization import ALWAYS_F32
from moe_edge.contracts.spec import EXPERT_CLASSES, TensorClass

Precision = Literal["fp32", "fp16", "int8", "int4"]
Provider = Literal["cpu", "cuda"]
WeightClass = Literal["expert", "shared", "attention", "head", "embedding", "router"]
CLASSES: tuple[WeightClass, ...] = ("expert", "shared", "attention", "head", "embedding")  # whose bits can be chosen
# precision -> class -> bits per weight (scales and zero points come on top)
PRECISIONS: dict[str, dict[WeightClass, int]] = {
    "fp32": {"expert": 32, "shared": 32, "attention": 32, "head": 32, "embedding": 32, "router": 32},
    "fp16": {"expert": 16, "shared": 16, "attention": 16, "head": 16, "embedding": 16, "router": 32},
    "int8": {"expert": 8, "shared": 8, "attention": 8, "head": 8, "embedding": 8, "router": 32},
    "int4": {"expert": 4, "shared": 8, "attention": 8, "head": 8, "embedding": 8, "router": 32},
}  # fmt: skip
# A tied embedding is the head's tensor, read twice: it has the head's bits.
QUANTIZED_BITS = (4, 8)
SMALLEST_BLOCK = 16
SCALE_BYTES = 2
LayerBits = Mapping[str, int]  # "class" or "class@first-last" (decoder layers, inclusive) -> bits; the first match wins
_KEY = re.compile(r"(?P<name>[a-z]+)(@(?P<first>\d+)-(?P<last>\d+))?")


class BitsKey(NamedTuple):
    """A parsed key of `LayerBits`; `layers` None = everywhere."""

    weight_class: str
    layers: range | None


def bits_key(text: str) -> BitsKey:
    """Parse 'expert' or 'expert@0-9'.

    Raises:
        ValueError: neither form, an unknown class, or an empty range.
    """
    match = _KEY.fullmatch(text)
    if match is None or match["name"] not in CLASSES:
        raise ValueError(f"'{text}' is not CLASS or CLASS@FIRST-LAST with a class of {', '.join(CLASSES)}")
    if match["first"] is None:
        return BitsKey(match["name"], None)
    layers = range(int(match["first"]), int(match["last"]) + 1)
    if not layers:
        raise ValueError(f"'{text}': the range of layers is empty")
    return BitsKey(match["name"], layers)


def refuse_absent_layers(layer_bits: LayerBits, layers: int) -> None:
    """Raises ConfigError when a key names layers that a model of so many does not have."""
    for text in layer_bits:
        named = bits_key(text).layers
        if named is not None and named.stop > layers:
            raise ConfigError(
                f"export.onnx.layer_bits: '{text}' names a layer that the model does not have",
                why=f"its {layers} layers are 0 to {layers - 1}",
            )


def weight_class(tensor_class: TensorClass) -> WeightClass | None:
    """The ONNX class of a tensor; None for what has none and stays in float32."""
    if tensor_class in EXPERT_CLASSES:
        return "expert"
    if tensor_class in ("router", "shared_router"):
        return "router"
    if tensor_class in ALWAYS_F32:
        return None
    if tensor_class in ("head", "embedding"):
        return tensor_class
    return "attention" if tensor_class.startswith("attention") else "shared"


def bits_of(
    precision: str,
    kind: WeightClass,
    layer: int | None = None,
    layer_bits: LayerBits | None = None,
    dense: bool = False,
) -> int:
    """Bits of a class of weights in a layer (None: outside the layers).

    Args:
        layer_bits: choices that replace those of the precision.
        dense: no layer of the model has experts.

    Raises:
        ConfigError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown ONNX precision '{precision}'", why=f"known: {', '.join(PRECISIONS)}")
    for text, bits in (layer_bits or {}).items():
        name, layers = bits_key(text)
        if name == kind and (layers is None or layer in layers):
            return bits
    return PRECISIONS[precision]["expert" if dense and kind == "shared" else kind]


def fitting_block(block_size: int, *row_lengths: int) -> int:
    """The largest block <= `block_size` (halving) that divides every row length.

    Raises:
        ConfigError: not even blocks of 16 divide the rows.
    """
    block = block_size
    while any(length % block for length in row_lengths):
        block //= 2
        if block < SMALLEST_BLOCK:
            raise ConfigError(
                f"rows of {' and '.join(map(str, row_lengths))} weights cannot be cut into blocks of {SMALLEST_BLOCK}",
                why="ONNX Runtime's quantized operators need whole blocks per row",
                next_command="--set export.onnx.precision=fp32",
            )
    return block


def stored_bytes(tensor_class: TensorClass, shape: tuple[int, ...], bits: int, block_size: int) -> int:
    """Bytes of a tensor (row length last) at `bits` per weight; an expert's matrices share one block size.

    Raises:
        ConfigError: no block divides its rows.
    """
    if bits not in QUANTIZED_BITS:
        return prod(shape) * bits // 8
    lengths = shape[1:] if tensor_class in EXPERT_CLASSES else shape[-1:]
    blocks, rows = shape[-1] // fitting_block(block_size, *lengths), prod(shape[:-1])
    return prod(shape) * bits // 8 + rows * (blocks * SCALE_BYTES + -(-blocks * bits // 8))
