"""ERNIE 4.5 MoE (21B-A3B, 300B-A47B): a selection bias in a module of its own, an ungated shared expert, and a dense
first layer.

Its rotary embeddings turn neighbouring columns. Layers that predict further tokens are left out.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_edge.families.base import Family
from moe_edge.families.declared import Names


def _dense_layers(values: Mapping[str, Any]) -> Iterator[int]:
    """All but every `interval`-th layer from the start to the end index."""
    start, last, layers = values["moe_layer_start_index"], values["moe_layer_end_index"], values["num_hidden_layers"]
    for layer in range(layers):
        inside = start <= layer <= (layers - 1 if last == -1 else last)
        if not inside or (layer + 1) % values["moe_layer_interval"]:
            yield layer


_BIAS = "moe_statics.e_score_correction_bias"
ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    defaults={
        "vocab_size": 103424, "hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 28,
        "num_attention_heads": 20, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "moe_intermediate_size": 1536, "moe_k": 6,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1,
        "use_bias": False, "default_theta": 500000.0,
    },
    refusals=((lambda v: bool(v["use_bias"]), "use_bias: biases in the feed-forward blocks and on the head"),),
    saved=Names(selection_bias=_BIAS, shared="mlp.shared_experts"),
    loaded=Names(selection_bias="gate." + _BIAS, shared="mlp.shared_experts"),
    ignored=("model.mtp_",),
    float32=("mlp.gate.weight", "e_score_correction_bias"),
    expert_keys=("moe_num_experts",),
    top_k_keys=("moe_k",),
    shared_width=lambda v: v["moe_intermediate_size"] * v["moe_num_shared_experts"],
    dense_layers=_dense_layers,
    spec_fields=lambda v: {"paired_rotary": True, "sliding_window": None},
)  # fmt: skip
