"""LFM2-MoE (LFM2-8B-A1B): most layers mix tokens by a short convolution, the others by attention with q/k norms.

The first layers are dense; the selection bias is a buffer of the block.
"""

from collections.abc import Mapping
from typing import Any

from moe_edge.families.base import Family
from moe_edge.families.declared import AttentionNames, Names


def _layers(values: Mapping[str, Any]) -> dict[str, Any]:
    kinds = tuple(_KINDS[kind] for kind in values["layer_types"])
    return {"layer_kinds": kinds, "mixer": {"kernel": values["conv_L_cache"]}, "sliding_window": None}


_KINDS = {"conv": "conv", "full_attention": "full"}
LFM2_MOE = Family(
    model_type="lfm2_moe",
    defaults={
        "vocab_size": 65536, "hidden_size": 2048, "intermediate_size": 7168, "moe_intermediate_size": 1792,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "norm_eps": 1e-5,
        "max_position_embeddings": 128000, "tie_word_embeddings": True, "conv_bias": False, "conv_L_cache": 3,
        "num_dense_layers": 2, "num_experts_per_tok": 4, "use_expert_bias": True, "routed_scaling_factor": 1.0,
        "norm_topk_prob": True, "layer_types": None, "default_theta": 1000000.0,
    },
    refusals=((lambda v: bool(v["conv_bias"]), "conv_bias: biases inside the convolutions"),),
    saved=Names(block="feed_forward", selection_bias="expert_bias", gate="w1", up="w3", down="w2"),
    attention_names=AttentionNames(
        output="self_attn.out_proj",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        input_norm="operator_norm",
        post_attention_norm="ffn_norm",
        final_norm="embedding_norm",
    ),
    float32=("expert_bias",),
    expert_keys=("num_experts",),
    eps_key="norm_eps",
    older_keys={"tie_embedding": "tie_word_embeddings"},
    qk_norm="per_head",
    gating="sigmoid",
    norm_topk=None,
    bias_argument=True,
    selection_key="use_expert_bias",
    dense_layers=lambda v: range(min(v["num_dense_layers"], v["num_hidden_layers"])),
    spec_fields=_layers,
)  # fmt: skip
