"""Qwen3.5-MoE, its language model: three of four layers mix tokens by gated linear attention, the others by attention
with a gate on its output; a sigmoid-gated shared expert.

The released models also see: their language model has its configuration under `text_config` and its tensors under
`model.language_model.`; the vision tower and the layers that predict further tokens are left out of a student.
"""

from collections.abc import Mapping
from typing import Any

from moe_edge.families.base import Family
from moe_edge.families.declared import Names


def _layers(values: Mapping[str, Any]) -> dict[str, Any]:
    interval = values.get("full_attention_interval", 4)
    types = values["layer_types"] or [
        "full_attention" if (layer + 1) % interval == 0 else "linear_attention"
        for layer in range(values["num_hidden_layers"])
    ]
    return {
        "layer_kinds": tuple(_KINDS[kind] for kind in types),
        "mixer": {
            "kernel": values["linear_conv_kernel_dim"],
            "key_heads": values["linear_num_key_heads"],
            "key_dim": values["linear_key_head_dim"],
            "value_heads": values["linear_num_value_heads"],
            "value_dim": values["linear_value_head_dim"],
        },
        "output_gate": True,
        "norm": "rms_around_one",
        "sliding_window": None,
    }


_KINDS = {"linear_attention": "linear", "full_attention": "full"}
QWEN3_5_MOE = Family(
    model_type="qwen3_5_moe",
    also_called=("qwen3_5_moe_text",),
    defaults={
        "vocab_size": 248320, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16,
        "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "head_dim": 256, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts_per_tok": 8,
        "layer_types": None, "partial_rotary_factor": 0.25, "default_theta": 10000.0,
    },
    refusals=((lambda v: bool(v.get("attention_bias")), "attention_bias: a bias on o_proj"),),
    saved=Names(shared="mlp.shared_expert", shared_router="mlp.shared_expert_gate"),
    prefixes=("model.language_model.", "model."),
    ignored=("model.visual.", "mtp."),
    nested_key="text_config",
    expert_keys=("num_experts",),
    qk_norm="per_head",
    shared_width=lambda v: v["shared_expert_intermediate_size"],
    shared_gated=True,
    spec_fields=_layers,
)  # fmt: skip
