"""What a tiny model of each family needs beside the common sizes: its keys, and values that make every feature matter.

Windows are shorter than the test rows, multipliers are not one, groups and dense first layers are there where the family
has them, so that a test which forgets one of them fails.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

HEADS, KV_HEADS = 4, 2


class Sizes(NamedTuple):
    experts: int
    top_k: int
    layers: int
    hidden: int
    width: int


def _mixed(sizes: Sizes, first: str, second: str) -> list[str]:
    return [second if layer % 2 else first for layer in range(sizes.layers)]


def _granite(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "intermediate_size": sizes.width,
        "attention_bias": True,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "logits_scaling": 1.5,
    }


def _gpt_oss(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "intermediate_size": sizes.width,
        "head_dim": 16,
        "sliding_window": 8,
        "swiglu_limit": 1.5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    }


def _ernie(sizes: Sizes) -> dict[str, Any]:
    return {
        "moe_num_experts": sizes.experts,
        "moe_k": sizes.top_k,
        "moe_intermediate_size": sizes.width,
        "intermediate_size": 2 * sizes.width,
        "moe_num_shared_experts": 2,
    }


def _deepseek(sizes: Sizes, **more: Any) -> dict[str, Any]:
    latent = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 24}
    routing = {
        "n_routed_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "moe_intermediate_size": sizes.width,
        "intermediate_size": 2 * sizes.width,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.7,
    }
    return {"num_key_value_heads": HEADS, **latent, **routing, **more}


def _glm4(sizes: Sizes) -> dict[str, Any]:
    return {
        "n_routed_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "moe_intermediate_size": sizes.width,
        "intermediate_size": 2 * sizes.width,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 1.7,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    }


def _qwen3_5(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "moe_intermediate_size": sizes.width,
        "shared_expert_intermediate_size": sizes.width + 16,
        "head_dim": 32,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": _mixed(sizes, "linear_attention", "full_attention"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    }


def _lfm2(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "moe_intermediate_size": sizes.width,
        "intermediate_size": 2 * sizes.width,
        "num_dense_layers": 1,
        "norm_eps": 1e-5,
        "routed_scaling_factor": 1.7,
        "layer_types": _mixed(sizes, "conv", "full_attention"),
    }


def _minimax(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "intermediate_size": sizes.width,
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    }


def _phimoe(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "intermediate_size": sizes.width,
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.3,
    }


TINY: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "granitemoe": _granite,
    "granitemoeshared": lambda sizes: _granite(sizes) | {"shared_intermediate_size": sizes.width + 16},
    "gpt_oss": _gpt_oss,
    "ernie4_5_moe": _ernie,
    "qwen3_5_moe": _qwen3_5,
    "deepseek_v2": lambda sizes: _deepseek(
        sizes, q_lora_rank=None, first_k_dense_replace=1, n_group=2, topk_group=1, topk_method="group_limited_greedy"
    ),
    "deepseek_v3": lambda sizes: _deepseek(sizes, q_lora_rank=24, first_k_dense_replace=1, n_group=2, topk_group=1),
    "glm4_moe": _glm4,
    "glm4_moe_lite": lambda sizes: _deepseek(sizes, q_lora_rank=24),
    "lfm2_moe": _lfm2,
    "minimax_m2": _minimax,
    "hunyuan_v1_moe": lambda sizes: {
        "num_experts": sizes.experts,
        "moe_topk": [sizes.top_k] * sizes.layers,
        "intermediate_size": sizes.width,
        "head_dim": 16,
    },
    "phimoe": _phimoe,
}
