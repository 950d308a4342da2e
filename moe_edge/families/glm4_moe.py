"""GLM-4.5 (Air), GLM-4.6 as `glm4_moe`, and GLM-4.7-Flash as `glm4_moe_lite`: variations of DeepSeek-V3, with its routing.

The first has grouped-query attention with an optional q/k norm and rotates half of each head, the second has latent
attention.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from moe_edge.families.deepseek import DEEPSEEK_V3


def _dense_layers(values: Mapping[str, Any]) -> Iterable[int]:
    """The layers that `mlp_layer_types` calls dense; without that list, the first."""
    types = values["mlp_layer_types"] or ["dense"]
    return [layer for layer, kind in enumerate(types) if kind != "sparse"]


GLM4_MOE = replace(
    DEEPSEEK_V3,
    model_type="glm4_moe",
    defaults={
        "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46,
        "num_attention_heads": 96, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": False, "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8, "n_shared_experts": 1, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "norm_topk_prob": True, "use_qk_norm": False, "partial_rotary_factor": 0.5,
        "default_theta": 10000.0,
    },
    refusals=(),
    qk_norm="per_head",
    qk_norm_key="use_qk_norm",
    bias_key="attention_bias",
    spec_fields=lambda v: {"sliding_window": None},
)  # fmt: skip

GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    model_type="glm4_moe_lite",
    defaults={
        "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240, "num_hidden_layers": 47,
        "num_attention_heads": 20, "num_key_value_heads": 20, "hidden_act": "silu", "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "moe_intermediate_size": 1536, "n_shared_experts": 1,
        "kv_lora_rank": 512, "q_lora_rank": 768, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4, "norm_topk_prob": True, "routed_scaling_factor": 1.8,
        "rope_interleave": True, "mlp_layer_types": None, "default_theta": 10000.0,
    },
    dense_layers=_dense_layers,
)  # fmt: skip
