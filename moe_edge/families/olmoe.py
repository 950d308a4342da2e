"""OLMoE: q and k normalised over their full width, optionally clipped; its top-k is usually not renormalised."""

from moe_edge.families.base import Family

OLMOE = Family(
    model_type="olmoe",
    defaults={
        "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "clip_qkv": None, "num_experts_per_tok": 8,
        "norm_topk_prob": False, "default_theta": 10000.0,
    },
    refusals=((lambda v: bool(v.get("attention_bias")), "attention_bias: a bias on o_proj"),),
    expert_width_key="intermediate_size",
    qk_norm="full_width",
    norm_topk=None,
    rotary="plain",
)  # fmt: skip
