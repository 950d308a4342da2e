"""gpt-oss (20B, 120B): biases on the router and inside the experts, a clamped SwiGLU, attention sinks, and a sliding
window in every second layer.

Expert matrices are stored transposed, gate and up columns alternating. The released checkpoints hold them in MXFP4, which
is read as the bfloat16 tensors that it stands for (storage/mxfp4.py).
"""

from collections.abc import Mapping
from typing import Any

from moe_edge.families.base import Family
from moe_edge.families.declared import Names


def _attention(values: Mapping[str, Any]) -> dict[str, Any]:
    types = values["layer_types"] or [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(values["num_hidden_layers"])
    ]
    return {"sinks": True, "layer_kinds": tuple(_KINDS[kind] for kind in types)}


def _swiglu(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "activation": "clamped_swiglu",
        "swiglu_alpha": float(values["swiglu_alpha"]),
        "swiglu_limit": float(values["swiglu_limit"]),
    }


_KINDS = {"sliding_attention": "sliding", "full_attention": "full"}
GPT_OSS = Family(
    model_type="gpt_oss",
    defaults={
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64, "num_hidden_layers": 36,
        "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128, "hidden_act": "silu",
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "layer_types": None,
        "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "attention_bias": True,
        "default_theta": 150000.0,
        "default_rope": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    saved=Names(router="router", per_expert=False),
    float32=("norm.weight",),
    expert_keys=("num_local_experts",),
    top_k_keys=("num_experts_per_tok", "experts_per_token"),
    expert_width_key="intermediate_size",
    bias_key="attention_bias",
    output_bias=True,
    gating="softmax_topk",
    router_bias=True,
    expert_biases=True,
    interleaved=True,
    spec_fields=_attention,
    moe_fields=_swiglu,
)  # fmt: skip
