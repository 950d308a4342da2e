"""Which bits every class of tensors gets in an ONNX export: one literal table that the exporter obeys and reports.

The routed experts are most of a Mixture-of-Experts model's bytes, so "int4" spends four bits there; attention, shared
experts, head and embedding are read for every token, are a few per cent of a large model and cost most quality per byte
saved, so they keep eight. The router and the norms always stay in float32: a flipped routing decision is no rounding
error.
"""

import re
from typing import Literal, NamedTuple

from moe_edge.contracts.errors import ConfigError

Precision = Literal["fp32", "fp16", "int8", "int4"]
WeightClass = Literal["expert", "shared", "attention", "head", "embedding", "router", "norm"]

# precision -> class -> bits per weight (scales and zero points come on top)
PRECISIONS: dict[str, dict[str, int]] = {
    "fp32": {"expert": 32, "shared": 32, "attention": 32, "head": 32, "embedding": 32, "router": 32, "norm": 32},
    "fp16": {"expert": 16, "shared": 16, "attention": 16, "head": 16, "embedding": 16, "router": 32, "norm": 32},
    "int8": {"expert": 8, "shared": 8, "attention": 8, "head": 8, "embedding": 8, "router": 32, "norm": 32},
    "int4": {"expert": 4, "shared": 8, "attention": 8, "head": 8, "embedding": 8, "router": 32, "norm": 32},
}  # fmt: skip
# A tied embedding is the head's tensor, read twice: it has the head's bits.
QUANTIZED_BITS = (4, 8)
SMALLEST_BLOCK = 16


class NodeRule(NamedTuple):
    """How a graph node is recognised, its class, and the imatrix key of its input columns (None: unweighted)."""

    pattern: str
    weight_class: WeightClass
    imatrix_key: str | None


# The first match wins; node names are those of onnxruntime-genai's builder and of onnx_graph.
NODE_RULES: tuple[NodeRule, ...] = (
    NodeRule(r"/attn/(qkv|q|k|v)_proj/MatMul$", "attention", "attention_in"),
    NodeRule(r"/attn/o_proj/MatMul$", "attention", "attention_o"),
    NodeRule(r"/conv/in_proj/MatMul$", "attention", "attention_in"),
    NodeRule(r"/conv/out_proj/MatMul$", "attention", "conv_out"),
    NodeRule(r"/moe/router/MatMul$", "router", None),
    NodeRule(r"/shared_expert_gate/MatMul$", "router", None),
    NodeRule(r"/mlp/(gate|up)_proj/MatMul$", "shared", "ffn_in"),
    NodeRule(r"/mlp/down_proj/MatMul$", "shared", "shared_down"),
    NodeRule(r"/lm_head/MatMul$", "head", "head_in"),
    NodeRule(r"/moe/MoE$", "expert", "expert_in"),
    NodeRule(r"/embed_tokens/Gather$", "embedding", None),
)


def bits_table(precision: str) -> dict[str, int]:
    """The row of PRECISIONS. Raises ConfigError when there is none."""
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown ONNX precision '{precision}'", why=f"known: {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def rule_of(node_name: str) -> NodeRule | None:
    """The rule of a node, or None for a node that carries no weight of ours."""
    return next((rule for rule in NODE_RULES if re.search(rule.pattern, node_name)), None)


def layer_of(node_name: str) -> int | None:
    """The decoder layer in a node's name, or None."""
    match = re.search(r"/layers\.(\d+)/", node_name)
    return int(match[1]) if match else None


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
