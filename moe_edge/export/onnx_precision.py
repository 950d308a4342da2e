"""Which nodes of the graph carry weights, and what they are: one literal table that the quantization pass walks.

The bits of each class are in contracts/onnx_bits.py.
"""

import re
from typing import NamedTuple

from moe_edge.contracts.onnx_bits import WeightClass

# Operator -> inputs that are weights; others (biases) stay as they are.
WEIGHT_INPUTS = {"MatMul": (1,), "MoE": (2, 4), "Gather": (0,)}


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


def rule_of(node_name: str) -> NodeRule | None:
    """The rule of a node, or None for a node that carries no weight of ours."""
    return next((rule for rule in NODE_RULES if re.search(rule.pattern, node_name)), None)


def layer_of(node_name: str) -> int | None:
    """The decoder layer in a node's name, or None."""
    match = re.search(r"/layers\.(\d+)/", node_name)
    return int(match[1]) if match else None
