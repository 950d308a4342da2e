"""Phi-3.5-MoE: Mixtral's names, layer norms with biases, and the sparsemixer, which chooses two experts one after the
other and weighs each by a softmax over those within a threshold of it (https://arxiv.org/abs/2409.12136).

No GGUF: llama.cpp approximates this routing by a renormalised softmax.
"""

from moe_edge.families.base import Family
from moe_edge.families.declared import Names

PHIMOE = Family(
    model_type="phimoe",
    defaults={
        "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": None, "num_experts_per_tok": 2,
        "attention_bias": False, "lm_head_bias": False, "default_theta": 1000000.0,
    },
    saved=Names(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    loaded=Names(router="router"),
    expert_keys=("num_local_experts",),
    expert_width_key="intermediate_size",
    bias_key="attention_bias",
    output_bias=True,
    gating="sparsemixer",
    norm_topk=False,
    fixed_top_k=2,
    spec_fields=lambda v: {"norm": "layer", "head_bias": bool(v["lm_head_bias"])},
)  # fmt: skip
