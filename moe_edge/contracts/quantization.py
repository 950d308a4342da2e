"""Quantization types and recipes as data: bytes per block, row-size fallbacks, and which type each tensor class gets.

The planner uses it to predict file sizes, the GGUF exporter to pin every tensor's type, so that the two cannot disagree and
llama.cpp's expert-count heuristics never decide. Block sizes: ggml's quantization format (ggml-common.h).
"""

from math import prod

from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.spec import TensorClass

# ggml type -> (weights per block, bytes per block)
GGML_TYPES: dict[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q8_0": (32, 34), "Q5_1": (32, 24), "Q5_0": (32, 22), "Q4_1": (32, 20), "Q4_0": (32, 18), "IQ4_NL": (32, 18),
    "Q6_K": (256, 210), "Q5_K": (256, 176), "Q4_K": (256, 144), "Q3_K": (256, 110), "Q2_K": (256, 84),
}  # fmt: skip
# When a row is not a multiple of the block: the next type with smaller blocks and at least as many bits.
FALLBACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "IQ4_NL", "Q2_K": "IQ4_NL"}

ALWAYS_F32: frozenset[TensorClass] = frozenset({"norm", "router", "shared_router", "attention_bias"})
_ATTENTION: tuple[TensorClass, ...] = ("attention_q", "attention_k", "attention_v", "attention_o")
_SHARED: tuple[TensorClass, ...] = ("shared_gate", "shared_up", "shared_down")


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
}
# Best quality first; what `bits: auto` walks through.
RECIPE_ORDER = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")


def pinned_type(recipe: str, tensor_class: TensorClass, row_length: int) -> str:
    """The ggml type of a tensor under a recipe, after the fallback its row length (n_in) demands.

    Raises:
        ConfigError: the recipe is unknown.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"unknown quantization '{recipe}'", why=f"known: {', '.join(RECIPES)}")
    if tensor_class in ALWAYS_F32:
        return "F32"
    kind = RECIPES[recipe][tensor_class]
    while row_length % GGML_TYPES[kind][0]:
        kind = FALLBACK.get(kind, "F16")
    return kind


def tensor_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of `shape` (row length last) stored as ggml type `kind`."""
    per_block, block_bytes = GGML_TYPES[kind]
    return prod(shape) // per_block * block_bytes
