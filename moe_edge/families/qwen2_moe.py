"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): biases on q, k, v and a sigmoid-gated shared expert."""

from collections.abc import Mapping
from typing import Any

from moe_edge.families.base import Family
from moe_edge.families.declared import Names


def _some_layers_slide(values: Mapping[str, Any]) -> bool:
    return bool(values.get("use_sliding_window")) or "sliding_attention" in (values.get("layer_types") or ())


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    defaults={
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4, "norm_topk_prob": False, "qkv_bias": True, "default_theta": 10000.0,
    },
    refusals=((_some_layers_slide, "a sliding window on every second layer"),),
    saved=Names(shared="mlp.shared_expert", shared_router="mlp.shared_expert_gate"),
    norm_topk=None,
    bias_key="qkv_bias",
    shared_width=lambda v: v["shared_expert_intermediate_size"],
    shared_gated=True,
    sliding_key="use_sliding_window",
    rotary="plain",
)  # fmt: skip
