"""Qwen3-MoE (Qwen3-30B-A3B and relatives): per-head q/k norms, no shared expert, width in `moe_intermediate_size`."""

from moe_edge.families.base import Family

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    defaults={
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "norm_topk_prob": False,
        "sliding_window": 4096, "default_theta": 10000.0,
    },
    refusals=((lambda v: bool(v.get("attention_bias")), "attention_bias: a bias on o_proj"),),
    qk_norm="per_head",
    norm_topk=None,
    sliding_key="use_sliding_window",
    rotary="plain",
)  # fmt: skip
