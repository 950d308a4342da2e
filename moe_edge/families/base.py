"""A family as data: which config keys, defaults and weight names one group of Hugging Face MoE models uses.

A row of `moe_edge.families.FAMILIES` is one `Family`. From raw config.json it gives the neutral `ModelSpec`; with the
tensor names of a checkpoint it gives the neutral `TensorEntry` list (names.py); it tells views.py where router and
experts lie in a loaded model. No torch in here.

Legend: E experts, K top-k.
"""

from collections.abc import Collection
from typing import Any

from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.spec import SCORED_BY, ModelSpec, MoESpec, TensorEntry
from moe_edge.families.checks import (
    COMMON_REFUSALS,
    DEEPEST,
    PLAIN_ROTARY,
    check_spec,
    refuse_absurd_depth,
    rejected,
    rotary,
)
from moe_edge.families.declared import Config, Declared
from moe_edge.families.names import tensor_entries

EXPERTS_PER_LAYER = "moe_edge_experts_per_layer"  # config key of a padded student: real experts of every MoE layer


class Family(Declared):
    """A declared family that reads configs and the tensor names of checkpoints."""

    @property
    def fewest_per_group(self) -> int:
        """Experts that every group needs for its score."""
        return SCORED_BY[self.group_score]

    def with_defaults(self, config: Config) -> dict[str, Any]:
        """The language model's config with the defaults of the transformers class filled in (null counts as given)."""
        own = config.get(self.nested_key, config) if self.nested_key else config
        renamed = {new: own[old] for old, new in self.older_keys.items() if old in own}
        outer = {key: config[key] for key in ("quantization_config",) if key in config}
        return {**self.defaults, **own, **renamed, **outer}

    def spec(self, config: Config) -> ModelSpec:
        """The neutral description of the model that `config` (a parsed config.json) declares.

        Raises:
            InputRejected: a feature that moe-edge cannot represent, or an impossible size.
        """
        values = self.with_defaults(config)
        refusals = (*COMMON_REFUSALS, *(PLAIN_ROTARY if self.rotary == "plain" else ()), *self.refusals)
        refuse_absurd_depth(self.model_type, values)
        try:
            reasons = [reason for condition, reason in refusals if condition(values)]
            spec = None if reasons else self._spec(values)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ZeroDivisionError) as error:
            raise rejected(self.model_type, f"a value has the wrong type or is missing: {error}") from error
        if spec is None:
            raise rejected(self.model_type, "; ".join(reasons))
        check_spec(spec, self.fixed_top_k)
        return spec

    def _spec(self, values: dict[str, Any]) -> ModelSpec:
        heads = values["num_attention_heads"]
        biased = bool(self.bias_key and values.get(self.bias_key))
        windowed = self.sliding_key is None or values.get(self.sliding_key)
        rope = rotary(values)
        dense = tuple(self.dense_layers(values)) if self.dense_layers else ()
        fields = {
            "family": self.model_type,
            "layers": values["num_hidden_layers"],
            "hidden": values["hidden_size"],
            "heads": heads,
            "kv_heads": values.get("num_key_value_heads") or heads,
            "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
            "vocab": values["vocab_size"],
            "context_length": values["max_position_embeddings"],
            "rms_eps": float(values[self.eps_key]),
            "rope_theta": float(rope.theta),
            "rotary_share": rope.share,
            "rope_scaling": rope.scaling,
            "tied_embeddings": bool(values["tie_word_embeddings"]),
            "attention_bias": biased,
            "output_bias": biased and self.output_bias,
            "qk_norm": self.qk_norm if self.qk_norm_key is None or values.get(self.qk_norm_key) else "none",
            "moe": self._moe(values),
            "sliding_window": (values.get("sliding_window") or None) if windowed else None,
            "clip_qkv": values.get("clip_qkv"),
            "dense_layers": dense,
            "dense_width": values["intermediate_size"] if dense else 0,
        }
        return ModelSpec(**(fields | (self.spec_fields(values) if self.spec_fields else {})))

    def _moe(self, values: dict[str, Any]) -> MoESpec:
        named = bool(self.saved.selection_bias)
        fields = {
            "experts": self.expert_count(values),
            "top_k": _same(values[self.top_k_keys[0]]),
            "expert_width": values[self.expert_width_key],
            "gating": self.gating,
            "renormalise": bool(values["norm_topk_prob"]) if self.norm_topk is None else self.norm_topk,
            "shared_width": self.shared_width(values) if self.shared_width else 0,
            "shared_gated": self.shared_gated,
            "router_bias": self.router_bias,
            "selection_bias": named and (self.selection_key is None or bool(values[self.selection_key])),
            "expert_biases": self.expert_biases,
            "group_score": self.group_score,
            "routed_scale": float(values.get("routed_scaling_factor", 1.0)),
            "experts_per_layer": tuple(values.get(EXPERTS_PER_LAYER) or ()),
        }
        return MoESpec(**(fields | (self.moe_fields(values) if self.moe_fields else {})))

    def expert_count(self, values: Config) -> int:
        """E from a config, under whichever of its names it carries.

        Raises:
            InputRejected: none of them is there, or they disagree.
        """
        found = {key: values[key] for key in self.expert_keys if values.get(key) is not None}
        if len(set(found.values())) != 1:
            why = f"found {found}, expected one of {', '.join(self.expert_keys)}"
            raise InputRejected("the config does not say how many experts there are", why=why)
        count: int = next(iter(found.values()))
        return count

    def tensors(self, config: Config, names: Collection[str]) -> list[TensorEntry]:
        """The neutral map of every tensor of a checkpoint; see `names.tensor_entries`."""
        return tensor_entries(self, self.spec(config), names, self.skipped(config))

    def skipped(self, config: Config) -> tuple[str, ...]:
        """Prefixes of checkpoint tensors that are left out: other modalities, and layers that predict more tokens.

        Raises:
            InputRejected: the number of those layers is none.
        """
        values = self.with_defaults(config)
        extra = (values.get(self.mtp_key) or 0) if self.mtp_key else 0
        if isinstance(extra, bool) or not isinstance(extra, int) or not 0 <= extra <= DEEPEST:
            raise rejected(self.model_type, f"{self.mtp_key} is {extra!r}, expected a number of layers")
        first = values["num_hidden_layers"]
        return (*self.ignored, *(f"model.layers.{first + number}." for number in range(extra)))


def _same(top_k: Any) -> Any:
    """K, also from a list with one number per layer.

    Raises:
        ValueError: the layers differ.
    """
    if not isinstance(top_k, list):
        return top_k
    if len(set(top_k)) != 1:
        raise ValueError(f"one top-k for all layers is needed, found {top_k}")
    return top_k[0]
