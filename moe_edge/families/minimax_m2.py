"""MiniMax-M2: Mixtral's names, sigmoid gates with a selection bias on the block, q/k norms over their full width.

Released configurations give the rotating columns of a head as `rotary_dim`.
"""

from collections.abc import Mapping
from typing import Any

from moe_edge.families.base import Family
from moe_edge.families.declared import Names


def _rotation(values: Mapping[str, Any]) -> dict[str, Any]:
    given = (values.get("rope_parameters") or {}).get("partial_rotary_factor") or values.get("partial_rotary_factor")
    share = given or values.get("rotary_dim", values["head_dim"]) / values["head_dim"]
    return {"rotary_share": float(share), "sliding_window": None}


MINIMAX_M2 = Family(
    model_type="minimax_m2",
    defaults={
        "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62,
        "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
        "max_position_embeddings": 196608, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "num_experts_per_tok": 8, "default_theta": 5000000.0,
    },
    saved=Names("block_sparse_moe", selection_bias="e_score_correction_bias", gate="w1", up="w3", down="w2"),
    loaded=Names(selection_bias="e_score_correction_bias"),
    expert_keys=("num_local_experts",),
    expert_width_key="intermediate_size",
    qk_norm="full_width",
    gating="sigmoid",
    bias_argument=True,
    spec_fields=_rotation,
)  # fmt: skip
