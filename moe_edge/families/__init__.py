"""The families of Mixture-of-Experts models that moe-edge supports: one literal row each.

The only room that names Hugging Face classes, weight names and config keys. A new family is one file and one row here.
"""

from collections.abc import Mapping
from typing import Any

from moe_edge.contracts.errors import InputRejected
from moe_edge.families.base import Family
from moe_edge.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from moe_edge.families.dense_families import DENSE_FAMILIES
from moe_edge.families.ernie4_5_moe import ERNIE4_5_MOE
from moe_edge.families.glm4_moe import GLM4_MOE, GLM4_MOE_LITE
from moe_edge.families.gpt_oss import GPT_OSS
from moe_edge.families.granite import GRANITEMOE, GRANITEMOESHARED
from moe_edge.families.hunyuan_v1_moe import HUNYUAN_V1_MOE
from moe_edge.families.lfm2_moe import LFM2_MOE
from moe_edge.families.minimax_m2 import MINIMAX_M2
from moe_edge.families.mixtral import MIXTRAL
from moe_edge.families.olmoe import OLMOE
from moe_edge.families.phimoe import PHIMOE
from moe_edge.families.qwen2_moe import QWEN2_MOE
from moe_edge.families.qwen3_5_moe import QWEN3_5_MOE
from moe_edge.families.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    "qwen3_moe": QWEN3_MOE,
    "qwen2_moe": QWEN2_MOE,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "granitemoe": GRANITEMOE,
    "gpt_oss": GPT_OSS,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "qwen3_5_moe": QWEN3_5_MOE,
    "granitemoeshared": GRANITEMOESHARED,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "glm4_moe": GLM4_MOE,
    "glm4_moe_lite": GLM4_MOE_LITE,
    "lfm2_moe": LFM2_MOE,
    "minimax_m2": MINIMAX_M2,
    "hunyuan_v1_moe": HUNYUAN_V1_MOE,
    "phimoe": PHIMOE,
}
_BY_MODEL_TYPE = {name: family for family in FAMILIES.values() for name in (family.model_type, *family.also_called)}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json.

    Raises:
        InputRejected: the model is dense, or its model_type is not supported.
    """
    kind = config.get("model_type")
    supported = f"supported families: {', '.join(FAMILIES)}"
    if isinstance(kind, str) and kind in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[kind]
    if not _mentions_experts(config):
        why = f"model_type {kind!r} declares no experts, so there is nothing to prune; {supported}"
        raise InputRejected("the model is dense, moe-edge needs a mixture of experts", where="config.json", why=why)
    raise InputRejected(f"unknown model family {kind!r}", where="config.json: model_type", why=supported)


def student_family(config: Mapping[str, Any]) -> Family:
    """As `family_of`, and the families of dense students, too."""
    dense = DENSE_FAMILIES.get(str(config.get("model_type")))
    return dense or family_of(config)


def known_family(config: Mapping[str, Any]) -> Family | None:
    """The family of a parsed config.json, also of a student that was derived from one; None: dense or not supported."""
    kind = config.get("base_model_type", config.get("model_type"))
    return _BY_MODEL_TYPE.get(kind) if isinstance(kind, str) else None


def _mentions_experts(config: Mapping[str, Any]) -> bool:
    nested = [value for value in config.values() if isinstance(value, dict)]
    keys = {str(key) for level in (config, *nested) for key in level}  # a loaded model's config has numbers, too
    return any("expert" in key or key.startswith("moe_") for key in keys)


__all__ = ["DENSE_FAMILIES", "FAMILIES", "Family", "family_of", "known_family", "student_family"]
