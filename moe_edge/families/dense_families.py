"""The dense classes that students of action `dense` are stored in, as rows like those of the mixtures.

A dense model is described as one whose every layer goes without experts (`ModelSpec.dense_layers`), so that exporters,
counters and readers need no second kind of description; its MoESpec is that of a single expert, which no layer has. They are
not among FAMILIES: a teacher must be a mixture.
"""

from collections.abc import Mapping
from typing import Any

from moe_edge.families import family_of
from moe_edge.families.base import Family
from moe_edge.families.granite import GRANITEMOE
from moe_edge.families.mixtral import MIXTRAL
from moe_edge.families.qwen2_moe import QWEN2_MOE
from moe_edge.families.qwen3_moe import QWEN3_MOE

_NO_EXPERTS = {"num_experts": 1, "num_experts_per_tok": 1}
_COMMON: dict[str, Any] = {
    "dense_layers": lambda v: range(v["num_hidden_layers"]),
    "expert_keys": ("num_experts",),
    "expert_width_key": "intermediate_size",
    "rotary": "plain",
}


def _defaults(mixture: Family, **more: Any) -> dict[str, Any]:
    return {**mixture.defaults, "intermediate_size": 22016, **more, **_NO_EXPERTS}


def _windows(values: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers have the window, where the config says it for each."""
    kinds = tuple("sliding" if kind == "sliding_attention" else "full" for kind in values.get("layer_types") or ())
    return {"layer_kinds": kinds} if len(set(kinds)) > 1 else {}


QWEN3 = Family(
    model_type="qwen3",
    defaults=_defaults(QWEN3_MOE),
    refusals=((lambda v: bool(v.get("attention_bias")), "attention_bias: a bias on o_proj"),),
    qk_norm="per_head",
    sliding_key="use_sliding_window",
    more=_windows,
    **_COMMON,
)
QWEN2 = Family(
    model_type="qwen2",
    defaults=_defaults(QWEN2_MOE, qkv_bias=True),
    bias_key="qkv_bias",
    sliding_key="use_sliding_window",
    more=_windows,
    **_COMMON,
)
MISTRAL = Family(model_type="mistral", defaults=_defaults(MIXTRAL), **_COMMON)
GRANITE = Family(
    model_type="granite",
    defaults=_defaults(GRANITEMOE),
    refusals=((lambda v: bool(v.get("mlp_bias")), "mlp_bias: biases inside the feed-forward blocks"),),
    bias_key="attention_bias",
    output_bias=True,
    more=GRANITEMOE.more,
    **_COMMON,
)
LLAMA = Family(
    model_type="llama",
    defaults=_defaults(MIXTRAL, default_theta=10000.0, rms_norm_eps=1e-6, sliding_window=None),
    refusals=((lambda v: bool(v.get("mlp_bias")), "mlp_bias: biases inside the feed-forward blocks"),),
    bias_key="attention_bias",
    output_bias=True,
    **_COMMON,
)
DENSE_FAMILIES: dict[str, Family] = {row.model_type: row for row in (QWEN3, QWEN2, MISTRAL, GRANITE, LLAMA)}


def student_family(config: Mapping[str, Any]) -> Family:
    """The family of a student's config.json, dense or not.

    Raises:
        InputRejected: neither a supported mixture nor a dense class that students are stored in.
    """
    kind = config.get("model_type")
    return DENSE_FAMILIES[kind] if isinstance(kind, str) and kind in DENSE_FAMILIES else family_of(config)
