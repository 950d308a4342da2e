"""Mixtral (8x7B, 8x22B): checkpoints call the block `block_sparse_moe` and its weights w1 (gate), w2 (down), w3 (up).

The router always renormalises its top-k; a sliding window, where given, holds for every layer.
"""

from moe_edge.families.base import Family
from moe_edge.families.declared import Names

MIXTRAL = Family(
    model_type="mixtral",
    defaults={
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": None, "num_experts_per_tok": 2,
        "default_theta": 1000000.0,
    },
    saved=Names(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    loaded=Names(),
    expert_width_key="intermediate_size",
    rotary="plain",
)  # fmt: skip
