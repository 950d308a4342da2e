"""Dense students as families: the plain decoder classes of `dense.DENSE_OF`, described and mapped like any mixture.

Every layer is dense, so that exporters and counters need no second path: `ModelSpec.moe_layers` is empty. They are no
teachers: `family_of` refuses them, `student_family` knows them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_edge.contracts.spec import MoESpec
from moe_edge.families.base import Family
from moe_edge.families.granite import multipliers


@dataclass(frozen=True)
class DenseFamily(Family):
    """A model_type without experts; its `MoESpec` is one expert that every token uses."""

    def _moe(self, values: dict[str, Any]) -> MoESpec:
        return MoESpec(1, 1, values["intermediate_size"], "softmax", True)


def _all_layers(values: Mapping[str, Any]) -> Iterable[int]:
    return range(values["num_hidden_layers"])


def _windows(values: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers have the window, where the config says it for each."""
    kinds = tuple("sliding" if kind == "sliding_attention" else "full" for kind in values.get("layer_types") or ())
    return {"layer_kinds": kinds} if len(set(kinds)) > 1 else {}


_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "default_theta": 10000.0,
}  # fmt: skip
_MLP_BIAS = (lambda v: bool(v.get("mlp_bias")), "mlp_bias: biases in the feed-forward blocks")
DENSE_FAMILIES: dict[str, Family] = {
    "qwen3": DenseFamily(
        model_type="qwen3",
        defaults=_DEFAULTS,
        spec_fields=_windows,
        qk_norm="per_head",
        bias_key="attention_bias",
        output_bias=True,
        sliding_key="use_sliding_window",
        rotary="plain",
        dense_layers=_all_layers,
    ),
    "qwen2": DenseFamily(
        model_type="qwen2",
        defaults=_DEFAULTS | {"qkv_bias": True},
        spec_fields=_windows,
        bias_key="qkv_bias",
        sliding_key="use_sliding_window",
        rotary="plain",
        dense_layers=_all_layers,
    ),
    "mistral": DenseFamily(model_type="mistral", defaults=_DEFAULTS, rotary="plain", dense_layers=_all_layers),
    "granite": DenseFamily(
        model_type="granite",
        refusals=(_MLP_BIAS,),
        bias_key="attention_bias",
        output_bias=True,
        spec_fields=multipliers,
        defaults=_DEFAULTS
        | {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0},
        dense_layers=_all_layers,
    ),
    "llama": DenseFamily(
        model_type="llama",
        defaults=_DEFAULTS,
        refusals=(_MLP_BIAS,),
        bias_key="attention_bias",
        output_bias=True,
        dense_layers=_all_layers,
        spec_fields=lambda v: {"sliding_window": None},
    ),
}
