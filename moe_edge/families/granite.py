"""Granite MoE (PowerMoE, Granite 3.x 1B-A400M and 3B-A800M), plain and with an ungated shared expert.

Checkpoints hold all experts of a layer in `input_linear` (gate rows first) and `output_linear`. Four multipliers scale
embedding, attention logits, what each block adds to the residual, and (as a divisor) the logits.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moe_edge.families.base import Family
from moe_edge.families.declared import Names

_SAVED = Names(
    block="block_sparse_moe",
    router="router.layer",
    fused_gate_up="input_linear.weight",
    fused_down="output_linear.weight",
    per_expert=False,
)
_LOADED = Names(block="block_sparse_moe", router="router", per_expert=False)
_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False, "embedding_multiplier": 1.0,
    "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0, "num_experts_per_tok": 2,
    "default_theta": 10000.0,
}  # fmt: skip


def multipliers(values: Mapping[str, Any]) -> dict[str, Any]:
    """ModelSpec fields of a Granite model, mixture or dense."""
    return {
        "embedding_scale": float(values["embedding_multiplier"]),
        "attention_scale": float(values["attention_multiplier"]),
        "residual_scale": float(values["residual_multiplier"]),
        "logits_divisor": float(values["logits_scaling"]),
        "sliding_window": None,
    }


GRANITEMOE = Family(
    model_type="granitemoe",
    defaults=_DEFAULTS,
    saved=_SAVED,
    loaded=_LOADED,
    expert_keys=("num_local_experts",),
    expert_width_key="intermediate_size",
    bias_key="attention_bias",
    output_bias=True,
    gating="softmax_topk",
    spec_fields=multipliers,
)


def _with_shared(names: Names) -> Names:
    return replace(names, shared="shared_mlp", shared_gate_up="input_linear.weight", shared_down="output_linear.weight")


GRANITEMOESHARED = Family(
    model_type="granitemoeshared",
    defaults={**_DEFAULTS, "shared_intermediate_size": 0},
    saved=_with_shared(_SAVED),
    loaded=_with_shared(_LOADED),
    expert_keys=("num_local_experts",),
    expert_width_key="intermediate_size",
    bias_key="attention_bias",
    output_bias=True,
    gating="softmax_topk",
    shared_width=lambda v: v["shared_intermediate_size"],
    spec_fields=multipliers,
)
