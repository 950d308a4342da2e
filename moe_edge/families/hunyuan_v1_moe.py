"""Hunyuan MoE v1 (A13B): the router is a linear layer inside the gate, q and k are normalised after their rotation, and
an ungated shared expert has the width of the others.

Released checkpoints stretch the base of the rotation by a fixed factor and call that "dynamic" with an `alpha`.
`moe_topk` may be a list with one number per layer, which must agree.
"""

from collections.abc import Mapping
from typing import Any

from moe_edge.families.base import Family
from moe_edge.families.checks import rotary
from moe_edge.families.declared import AttentionNames, Names


def _attention(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"norm_after_rope": True, "sliding_window": None}
    rope, width = rotary(values), values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    alpha = (rope.scaling or {}).get("alpha")
    if rope.kind == "dynamic" and alpha:  # HunYuanMoEV1RotaryEmbedding.compute_ntk_alpha_rope_parameters
        found |= {"rope_scaling": None, "rope_theta": rope.theta * alpha ** (width / (width - 2))}
    return found


HUNYUAN_V1_MOE = Family(
    model_type="hunyuan_v1_moe",
    defaults={
        "vocab_size": 290943, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": False, "moe_topk": 1, "head_dim": None,
        "default_theta": 10000.0,
    },
    saved=Names(weight="wg.weight", shared="mlp.shared_mlp"),
    attention_names=AttentionNames(q_norm="self_attn.query_layernorm", k_norm="self_attn.key_layernorm"),
    float32=("gate.wg.weight",),
    expert_keys=("num_experts",),
    top_k_keys=("moe_topk",),
    expert_width_key="intermediate_size",
    qk_norm="per_head",
    bias_key="attention_bias",
    output_bias=True,
    shared_width=lambda v: v["intermediate_size"],
    spec_fields=_attention,
)  # fmt: skip
