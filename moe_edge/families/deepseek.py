"""DeepSeek-V2 (with V2-Lite) and DeepSeek-V3 (with Moonlight): multi-head latent attention, dense first layers, ungated
shared experts, and experts in groups of which only the best are searched.

V2 weighs by a softmax and scores a group by its best expert; V3 weighs by sigmoids, adds a selection bias, and scores a
group by its best two. Layers that predict further tokens are left out.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from moe_edge.contracts.spec import LatentSpec
from moe_edge.families.base import Family
from moe_edge.families.declared import Names


def latent_attention(values: Mapping[str, Any]) -> dict[str, Any]:
    """ModelSpec fields of a model with latent attention."""
    latent = LatentSpec(
        kv_rank=values["kv_lora_rank"],
        q_rank=values["q_lora_rank"],
        nope_dim=values["qk_nope_head_dim"],
        rope_dim=values["qk_rope_head_dim"],
        value_dim=values["v_head_dim"],
    )
    return {
        "attention": "mla",
        "latent": latent,
        "head_dim": latent.nope_dim + latent.rope_dim,
        "rotary_share": 1.0,
        "paired_rotary": bool(values.get("rope_interleave", True)),
        "sliding_window": None,
    }


def first_layers(values: Mapping[str, Any]) -> Iterable[int]:
    """The dense layers: the first `first_k_dense_replace`."""
    return range(min(values["first_k_dense_replace"], values["num_hidden_layers"]))


def groups(values: Mapping[str, Any]) -> dict[str, Any]:
    """MoESpec fields of group-limited routing."""
    return {"groups": values["n_group"], "groups_used": values["topk_group"]}


def _v2_groups(values: Mapping[str, Any]) -> dict[str, Any]:
    return groups(values) if values["topk_method"] == "group_limited_greedy" else {}


def shared_width(values: Mapping[str, Any]) -> int:
    """Neurons of the shared experts, which are one network."""
    width: int = values["moe_intermediate_size"] * values["n_shared_experts"]
    return width


BIASES = (lambda v: bool(v.get("attention_bias")), "attention_bias: biases inside the latent attention")
SELECTION = "gate.e_score_correction_bias"

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    defaults={
        "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "first_k_dense_replace": 0, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": None,
        "topk_group": None, "topk_method": "greedy", "n_shared_experts": 2, "num_experts_per_tok": None,
        "moe_intermediate_size": 1407, "routed_scaling_factor": 1.0, "default_theta": 10000.0,
    },
    refusals=(
        BIASES,
        (lambda v: bool(v.get("mlp_bias")), "mlp_bias: biases in the feed-forward blocks"),
        (lambda v: v["topk_method"] not in ("greedy", "group_limited_greedy"), "topk_method is not known"),
    ),
    saved=Names(shared="mlp.shared_experts"),
    expert_keys=("n_routed_experts",),
    norm_topk=False,  # transformers never renormalises, whatever norm_topk_prob says
    shared_width=shared_width,
    dense_layers=first_layers,
    spec_fields=latent_attention,
    moe_fields=_v2_groups,
)  # fmt: skip

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    defaults={
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "hidden_act": "silu", "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "first_k_dense_replace": 3, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 8,
        "topk_group": 4, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rope_interleave": True, "default_theta": 10000.0,
    },
    refusals=(BIASES,),
    saved=Names(selection_bias=SELECTION, shared="mlp.shared_experts"),
    float32=("e_score_correction_bias",),
    expert_keys=("n_routed_experts",),
    mtp_key="num_nextn_predict_layers",
    gating="sigmoid",
    norm_topk=None,
    group_score="top2_sum",
    shared_width=shared_width,
    dense_layers=first_layers,
    spec_fields=latent_attention,
    moe_fields=groups,
)  # fmt: skip
