"""Quantization types and recipes as data: bytes per block, row-size fallbacks, and which type each tensor class gets.

The planner uses it to predict file sizes, the GGUF exporter to pin every tensor's type, so that the two cannot disagree and
llama.cpp's expert-count heuristics never decide. A plan may replace a recipe's types by its own, per class and range of
layers (`Mix`). Block sizes: ggml's quantization format (ggml-common.h).
"""

import re
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.spec import TensorClass

# ggml type -> (weights per block, bytes per block)
GGML_TYPES: dict[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q8_0": (32, 34), "Q5_1": (32, 24), "Q5_0": (32, 22), "Q4_1": (32, 20), "Q4_0": (32, 18), "IQ4_NL": (32, 18),
    "MXFP4": (32, 17),
    "Q6_K": (256, 210), "Q5_K": (256, 176), "Q4_K": (256, 144), "Q3_K": (256, 110), "Q2_K": (256, 84),
    "IQ4_XS": (256, 136), "IQ3_S": (256, 110), "IQ3_XXS": (256, 98), "IQ2_S": (256, 82), "IQ2_XS": (256, 74),
    "IQ2_XXS": (256, 66),
}  # fmt: skip
# When a row is not a multiple of the block: the next type with smaller blocks and at least as many bits.
FALLBACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "IQ4_NL", "Q2_K": "IQ4_NL"}
_CODEBOOKS = ("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS")  # weights as points of a small lattice
FALLBACK |= dict.fromkeys(_CODEBOOKS, "IQ4_NL")
# Useless without an importance matrix: llama.cpp refuses them (llama-quant.cpp, tensor_requires_imatrix).
NEEDS_IMATRIX = frozenset({"IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS"})

ALWAYS_F32: frozenset[TensorClass] = frozenset(
    {
        "norm", "router", "router_bias", "selection_bias", "expert_bias", "shared_router", "attention_bias", "head_bias",
    }
)  # fmt: skip
_ATTENTION: tuple[TensorClass, ...] = (
    "attention_q", "attention_k", "attention_v", "attention_o", "attention_other",
)  # fmt: skip
_SHARED: tuple[TensorClass, ...] = (
    "shared_gate", "shared_up", "shared_down", "dense_gate", "dense_up", "dense_down",
)  # fmt: skip


def _recipe(everywhere: str, **by_class: str) -> dict[TensorClass, str]:
    classes: tuple[TensorClass, ...] = (
        "embedding", "head", *_ATTENTION, *_SHARED, "expert_gate", "expert_up", "expert_down",
    )  # fmt: skip
    return {name: by_class.get(name, everywhere) for name in classes}


# Attention and shared experts are read for every token and are a few per cent of a MoE's bytes: they stay at 6 bits or more.
_DENSE_Q6 = dict.fromkeys(("embedding", "head", *_ATTENTION, *_SHARED), "Q6_K")
RECIPES: dict[str, dict[TensorClass, str]] = {
    "F32": _recipe("F32"),
    "F16": _recipe("F16"),
    "Q8_0": _recipe("Q8_0"),
    "Q6_K": _recipe("Q6_K"),
    "Q5_K_M": _recipe("Q5_K", **(_DENSE_Q6 | {"expert_down": "Q6_K"})),
    "Q4_K_M": _recipe("Q4_K", **(_DENSE_Q6 | {"expert_down": "Q5_K"})),
    # Q4_0 on attention and shared experts costs ten times the KL of Q4_0 on the routed experts alone (measured: .26 to .04).
    "Q4_0": _recipe("Q4_0", **(dict.fromkeys((*_ATTENTION, *_SHARED), "Q8_0") | {"embedding": "Q6_K", "head": "Q6_K"})),
    "Q3_K_M": _recipe("Q3_K", **(_DENSE_Q6 | {"expert_down": "Q4_K"})),
    "Q2_K": _recipe("Q2_K", **(_DENSE_Q6 | {"expert_down": "Q3_K"})),
    # Codebooks: fewer bits for the same error where there is an importance matrix, slower on a CPU. The down projection,
    # whose rows are the most sensitive, gets the next larger type.
    "IQ4_NL": _recipe("IQ4_NL", **_DENSE_Q6),
    "IQ4_XS": _recipe("IQ4_XS", **_DENSE_Q6),
    "IQ3_S": _recipe("IQ3_S", **(_DENSE_Q6 | {"expert_down": "IQ4_XS"})),
    "IQ3_XXS": _recipe("IQ3_XXS", **(_DENSE_Q6 | {"expert_down": "IQ3_S"})),
    "IQ2_S": _recipe("IQ2_S", **(_DENSE_Q6 | {"expert_down": "IQ3_XXS"})),
    "IQ2_XS": _recipe("IQ2_XS", **(_DENSE_Q6 | {"expert_down": "IQ3_XXS"})),
    "IQ2_XXS": _recipe("IQ2_XXS", **(_DENSE_Q6 | {"expert_down": "IQ2_S"})),
    # 4-bit floats with a power of two per 32 weights, for the experts; all else as llama.cpp has it beside them.
    "MXFP4": _recipe("Q8_0", **dict.fromkeys(("expert_gate", "expert_up", "expert_down"), "MXFP4")),
}
# Best quality first; what `bits: auto` walks through.
RECIPE_ORDER = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")


# The classes in which a plan chooses bits: what is read together, and as sensitive, is stored alike.
BIT_CLASSES: dict[str, tuple[TensorClass, ...]] = {
    "attention": _ATTENTION,
    "expert_gate_up": ("expert_gate", "expert_up"),
    "expert_down": ("expert_down",),
    "shared": _SHARED,
    "embedding_head": ("embedding", "head"),
}
BIT_CLASS_OF: dict[TensorClass, str] = {member: name for name, members in BIT_CLASSES.items() for member in members}
LEVELS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")  # what a plan chooses among, fewest bits first
# And these for the routed experts, whose importance is known wherever there is a profile: they fill the gaps at 2 to 4 bits.
# IQ3_S is not among them: it takes the bytes of Q3_K and on the demo teacher cost no less KL (measured).
CODEBOOK_LEVELS = ("IQ2_S", "IQ3_XXS", "IQ4_XS")
CODEBOOK_CLASSES = ("expert_gate_up", "expert_down")
Mix = Mapping[str, str]  # "class" or "class@first-last" (decoder layers, inclusive) -> ggml type; the first match wins
_MIX_KEY = re.compile(r"(?P<name>[a-z_]+)(@(?P<first>\d+)-(?P<last>\d+))?")


class MixKey(NamedTuple):
    """A parsed key of a mix; `layers` None = everywhere."""

    bit_class: str
    layers: range | None


def mix_key(text: str) -> MixKey:
    """Parse 'expert_down' or 'expert_down@0-9'.

    Raises:
        ValueError: neither form, an unknown class, or an empty range.
    """
    match = _MIX_KEY.fullmatch(text)
    if match is None or match["name"] not in BIT_CLASSES:
        raise ValueError(f"'{text}' is not CLASS or CLASS@FIRST-LAST with a class of {', '.join(BIT_CLASSES)}")
    if match["first"] is None:
        return MixKey(match["name"], None)
    layers = range(int(match["first"]), int(match["last"]) + 1)
    if not layers:
        raise ValueError(f"'{text}': the range of layers is empty")
    return MixKey(match["name"], layers)


def layer_thirds(layers: int) -> list[range]:
    """First, middle and last third of a model's decoder layers, as even as they go; fewer ranges below three layers."""
    edges = [-(-layers * part // 3) for part in range(4)]
    return [range(first, last) for first, last in zip(edges, edges[1:], strict=False) if first < last]


def mixed_type(mix: Mix, tensor_class: TensorClass, layer: int | None) -> str | None:
    """The type that a mix gives to a tensor of a layer (None: outside the layers); None where it says nothing."""
    for text, kind in mix.items():
        name, layers = mix_key(text)
        if name == BIT_CLASS_OF.get(tensor_class) and (layers is None or layer in layers):
            return kind
    return None


def type_for_row(kind: str, row_length: int) -> str:
    """`kind`, or the next type whose blocks divide the row (n_in), at last F16."""
    while row_length % GGML_TYPES[kind][0]:
        kind = FALLBACK.get(kind, "F16")
    return kind


def chosen_type(recipe: str, tensor_class: TensorClass, layer: int | None = None, mix: Mix | None = None) -> str:
    """The ggml type that a recipe and a plan's mix name for a tensor, whatever its rows are.

    Raises:
        ConfigError: the recipe is unknown.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"unknown quantization '{recipe}'", why=f"known: {', '.join(RECIPES)}")
    if tensor_class in ALWAYS_F32:
        return "F32"
    return (mixed_type(mix, tensor_class, layer) if mix else None) or RECIPES[recipe][tensor_class]


def pinned_type(
    recipe: str, tensor_class: TensorClass, row_length: int, layer: int | None = None, mix: Mix | None = None
) -> str:
    """`chosen_type` after the fallback that the tensor's row length (n_in) demands."""
    return type_for_row(chosen_type(recipe, tensor_class, layer, mix), row_length)


def bits_per_weight(kind: str) -> float:
    """Stored bits per weight, scales included."""
    per_block, block_bytes = GGML_TYPES[kind]
    return 8 * block_bytes / per_block


def tensor_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of `shape` (row length last) stored as ggml type `kind`."""
    per_block, block_bytes = GGML_TYPES[kind]
    return prod(shape) // per_block * block_bytes
