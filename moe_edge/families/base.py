"""A family as data: which config keys, defaults and weight names one group of Hugging Face MoE models uses.

A row of `moe_edge.families.FAMILIES` is one `Family`. From raw config.json it gives the neutral `ModelSpec`; with the
tensor names of a checkpoint it gives the neutral `TensorEntry` list (names.py). No torch in here.

Legend: L layers, E experts, K top-k, D model, F expert width, V vocabulary.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.spec import ModelSpec, MoESpec, TensorClass, TensorEntry
from moe_edge.families.names import tensor_entries

Config = Mapping[str, Any]
EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts")
Refusal = tuple[Callable[[Config], bool], str]


@dataclass(frozen=True)
class Family:
    """One model_type: everything that differs from its sisters, declared.

    `defaults` are those of the transformers config class, for keys that an older config.json leaves out.
    """

    model_type: str
    defaults: Mapping[str, Any]
    expert_width_key: str
    qk_norm: Literal["none", "per_head", "full_width"]
    norm_topk: bool | None  # None: the config's norm_topk_prob decides
    block: str  # the MoE block's name in checkpoints
    projections: Mapping[TensorClass, str]  # expert_gate, expert_up, expert_down -> per-expert weight name
    refusals: tuple[Refusal, ...]  # (condition on the config with defaults, reason)
    bias_key: str | None = None  # config key that switches the q, k, v bias on
    shared: bool = False  # has a gated shared expert
    sliding_key: str | None = None  # config key that switches the sliding window on; None: always on

    def settled(self, config: Config) -> dict[str, Any]:
        """`config` with the defaults of the transformers class filled in (null counts as given)."""
        return {**self.defaults, **config}

    def spec(self, config: Config) -> ModelSpec:
        """The neutral description of the model that `config` (a parsed config.json) declares.

        Raises:
            InputRejected: a feature that moe-edge cannot represent, or an impossible size.
        """
        values = self.settled(config)
        try:
            reasons = [reason for condition, reason in (*_COMMON_REFUSALS, *self.refusals) if condition(values)]
            spec = None if reasons else self._spec(values)
        except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise _rejected(self.model_type, f"a value has the wrong type: {error}") from error
        if spec is None:
            raise _rejected(self.model_type, "; ".join(reasons))
        _check_sizes(spec)
        return spec

    def _spec(self, values: dict[str, Any]) -> ModelSpec:
        heads = values["num_attention_heads"]
        head_dim = values.get("head_dim") or values["hidden_size"] // heads
        windowed = self.sliding_key is None or values.get(self.sliding_key)
        return ModelSpec(
            family=self.model_type,
            layers=values["num_hidden_layers"],
            hidden=values["hidden_size"],
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            vocab=values["vocab_size"],
            context_length=values["max_position_embeddings"],
            rms_eps=float(values["rms_norm_eps"]),
            rope_theta=float(_rope(values)["rope_theta"]),
            tied_embeddings=bool(values["tie_word_embeddings"]),
            attention_bias=bool(self.bias_key and values.get(self.bias_key)),
            qk_norm=self.qk_norm,
            moe=self._moe(values),
            sliding_window=(values.get("sliding_window") or None) if windowed else None,
            clip_qkv=values.get("clip_qkv"),
        )

    def _moe(self, values: dict[str, Any]) -> MoESpec:
        renormalise = bool(values["norm_topk_prob"]) if self.norm_topk is None else self.norm_topk
        return MoESpec(
            experts=expert_count(values),
            top_k=values["num_experts_per_tok"],
            expert_width=values[self.expert_width_key],
            gating="softmax",
            renormalise=renormalise,
            shared_width=values["shared_expert_intermediate_size"] if self.shared else 0,
            shared_gated=self.shared,
        )

    def tensors(self, config: Config, names: Collection[str]) -> list[TensorEntry]:
        """The neutral map of every tensor of a checkpoint; see `names.tensor_entries`."""
        return tensor_entries(self, self.spec(config), names)


def expert_count(values: Config) -> int:
    """E from a config, under whichever of its two names it carries.

    Raises:
        InputRejected: both names are there and disagree.
    """
    found = {key: values[key] for key in EXPERT_COUNT_KEYS if values.get(key) is not None}
    if len(set(found.values())) != 1:
        raise InputRejected("the config does not say how many experts there are", why=f"found {found}")
    return next(iter(found.values()))


def _rope(values: Config) -> Mapping[str, Any]:
    """Rotary parameters, from `rope_parameters` (transformers 5) or the older top-level keys."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    theta = given.get("rope_theta") or values.get("rope_theta") or values["default_theta"]
    partial = given.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1.0
    return {"rope_theta": theta, "rope_type": kind, "partial": partial}


_COMMON_REFUSALS: tuple[Refusal, ...] = (
    (lambda v: bool(v.get("mlp_only_layers")), "mlp_only_layers: some layers are dense, every layer must be a MoE"),
    (lambda v: v.get("decoder_sparse_step", 1) != 1, "decoder_sparse_step is not 1: some layers are dense"),
    (lambda v: v["hidden_act"] != "silu", "hidden_act is not silu"),
    (lambda v: _rope(v)["rope_type"] not in ("default", None), "scaled rotary embeddings (rope_type is not 'default')"),
    (lambda v: _rope(v)["partial"] != 1.0, "partial_rotary_factor is not 1"),
    (lambda v: "quantization_config" in v, "a quantized checkpoint; start from the float32, float16 or bfloat16 one"),
)


def _check_sizes(spec: ModelSpec) -> None:
    """Raises InputRejected when a size is not a positive integer or sizes contradict one another."""
    moe = spec.moe
    sizes = {
        "num_hidden_layers": spec.layers, "hidden_size": spec.hidden, "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads, "head_dim": spec.head_dim, "vocab_size": spec.vocab,
        "max_position_embeddings": spec.context_length, "number of experts": moe.experts,
        "num_experts_per_tok": moe.top_k, "expert width": moe.expert_width,
    }  # fmt: skip
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _rejected(spec.family, f"{name} is {value!r}, expected a positive integer")
    if moe.top_k > moe.experts:
        raise _rejected(spec.family, f"top-k {moe.top_k} exceeds the {moe.experts} experts")
    if spec.heads % spec.kv_heads:
        raise _rejected(spec.family, f"{spec.heads} heads cannot share {spec.kv_heads} key-value heads")


def _rejected(family: str, reason: str) -> InputRejected:
    return InputRejected(f"this {family} model is not supported", where="config.json", why=reason)
