"""The families of Mixture-of-Experts models that moe-edge supports: one literal row each.

The only room that names Hugging Face classes, weight names and config keys. A new family is one file and one row here.
"""

from collections.abc import Mapping
from typing import Any

from moe_edge.contracts.errors import InputRejected
from moe_edge.families.base import EXPERT_COUNT_KEYS, Family
from moe_edge.families.mixtral import MIXTRAL
from moe_edge.families.names import assemble
from moe_edge.families.olmoe import OLMOE
from moe_edge.families.qwen2_moe import QWEN2_MOE
from moe_edge.families.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    "qwen3_moe": QWEN3_MOE,
    "qwen2_moe": QWEN2_MOE,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json.

    Raises:
        InputRejected: the model is dense, or its model_type is not supported.
    """
    kind = config.get("model_type")
    supported = f"supported families: {', '.join(FAMILIES)}"
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    if not _mentions_experts(config):
        why = f"model_type {kind!r} declares no experts, so there is nothing to prune; {supported}"
        raise InputRejected("the model is dense, moe-edge needs a mixture of experts", where="config.json", why=why)
    raise InputRejected(f"unknown model family {kind!r}", where="config.json: model_type", why=supported)


def _mentions_experts(config: Mapping[str, Any]) -> bool:
    nested = [value for value in config.values() if isinstance(value, dict)]
    keys = {key for level in (config, *nested) for key in level}
    return any("expert" in key or key.startswith("moe_") for key in keys)


__all__ = ["EXPERT_COUNT_KEYS", "FAMILIES", "Family", "assemble", "family_of"]
