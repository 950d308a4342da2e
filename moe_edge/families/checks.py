"""What no family can represent, read from a config with its defaults: reasons to refuse, and sizes that contradict.

A reason here ends every use of the model. What only some runtime cannot compute is a feature of the `ModelSpec`
instead (contracts/spec.py), so that the model can still be profiled and compressed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_edge.contracts.capabilities import unpaddable
from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.spec import ModelSpec, keepable_counts

Config = Mapping[str, Any]
Refusal = tuple[Callable[[Config], bool], str]


@dataclass(frozen=True)
class Rotary:
    """Rotary position embeddings."""

    theta: float
    kind: str
    share: float  # of a head's columns that rotate
    scaling: Mapping[str, Any] | None  # None: unscaled


def rotary(values: Config) -> Rotary:
    """From `rope_parameters` (transformers 5), the older top-level keys, or the defaults of the family."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or values.get("default_rope") or {}
    kind = given.get("rope_type", given.get("type", "default")) or "default"
    theta = given.get("rope_theta") or values.get("rope_theta") or values["default_theta"]
    share = given.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1.0
    scaling = {key: value for key, value in given.items() if key not in ("type", "rope_theta", "partial_rotary_factor")}
    return Rotary(theta, kind, float(share), None if kind == "default" else scaling | {"rope_type": kind})


COMMON_REFUSALS: tuple[Refusal, ...] = (
    (lambda v: bool(v.get("mlp_only_layers")), "mlp_only_layers: some layers are dense, every layer must be a MoE"),
    (lambda v: v.get("decoder_sparse_step", 1) != 1, "decoder_sparse_step is not 1: some layers are dense"),
    (lambda v: v.get("hidden_act", "silu") != "silu", "hidden_act is not silu"),
    (
        lambda v: "quantization_config" in v,
        "a quantized checkpoint; start from the float32, float16 or bfloat16 one (MXFP4 is read, of gpt_oss)",
    ),
)
PLAIN_ROTARY: tuple[Refusal, ...] = (
    (lambda v: rotary(v).scaling is not None, "scaled rotary embeddings (rope_type is not 'default')"),
    (lambda v: rotary(v).share != 1.0, "partial_rotary_factor is not 1"),
)


DEEPEST = 1 << 16  # layers; lists with an item per layer are made before the tensors are counted


def refuse_absurd_depth(family: str, values: Config) -> None:
    """Raises InputRejected when a config declares more layers than any model has."""
    layers = values.get("num_hidden_layers")
    if isinstance(layers, int) and layers > DEEPEST:
        raise rejected(family, f"config.json declares {layers} layers")


def check_spec(spec: ModelSpec, fixed_top_k: int | None = None) -> None:
    """Raises InputRejected when a size is not a positive integer or sizes contradict one another."""
    moe = spec.moe
    sizes = {
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.context_length,
        "number of experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "expert width": moe.expert_width,
        "number of expert groups": moe.groups,
        "number of groups in use": moe.groups_used,
    }
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise rejected(spec.family, f"{name} is {value!r}, expected a positive integer")
    contradictions = (
        (moe.top_k > moe.experts, f"top-k {moe.top_k} exceeds the {moe.experts} experts"),
        (bool(spec.heads % spec.kv_heads), f"{spec.heads} heads cannot share {spec.kv_heads} key-value heads"),
        (bool(moe.experts % moe.groups), f"{moe.experts} experts do not divide into {moe.groups} groups"),
        (moe.groups_used > moe.groups, f"{moe.groups_used} groups are used of {moe.groups}"),
        (
            moe.top_k > moe.reachable(moe.experts),
            f"top-k {moe.top_k} exceeds the {moe.reachable(moe.experts)} experts of {moe.groups_used} groups",
        ),
        (moe.experts // moe.groups < moe.fewest_per_group, f"{moe.experts} experts in {moe.groups} groups are too few"),
        (fixed_top_k not in (None, moe.top_k), f"top-k is {moe.top_k}, the model code computes {fixed_top_k} only"),
        (len(spec.dense_layers) == spec.layers and moe.experts > 1, "every layer is dense"),
        (len(spec.layer_kinds) not in (0, spec.layers), f"layer_types is not a list of {spec.layers} kinds"),
        (bool(spec.dense_layers) and not _positive(spec.dense_width), f"dense width is {spec.dense_width!r}"),
    )
    for wrong, reason in contradictions:
        if wrong:
            raise rejected(spec.family, reason)
    _check_padding(spec)


def _check_padding(spec: ModelSpec) -> None:
    """Raises InputRejected when a layer of a padded student could not have so many real experts."""
    counts = spec.moe.experts_per_layer
    if not counts:
        return
    if why := unpaddable(spec):
        raise rejected(spec.family, f"padded layers, but {why}")
    possible = keepable_counts(spec)
    if len(counts) != len(spec.moe_layers) or any(type(count) is not int or count not in possible for count in counts):
        why = f"real experts per layer are {list(counts)}, expected {len(spec.moe_layers)} numbers of {possible}"
        raise rejected(spec.family, why)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def rejected(family: str, reason: str) -> InputRejected:
    """The error for a model that a family cannot represent."""
    return InputRejected(f"this {family} model is not supported", where="config.json", why=reason)
