"""Parameter counts of a model from its neutral tensor map alone: totals, what one token reads, and per tensor class.

The plan, the report and the compressor's summary all count here, so that they cannot disagree.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from moe_edge.contracts.spec import EXPERT_OWNED, ModelSpec, TensorClass, TensorEntry
from moe_edge.families import family_of
from moe_edge.storage.checkpoint import CheckpointHeaders


@dataclass(frozen=True)
class ParamCounts:
    """Numbers of weights; tied embeddings count once."""

    total: int
    active: int  # used for one token: everything but the experts that the router leaves out
    routed: int  # in routed experts
    by_class: dict[TensorClass, int]


def count_params(spec: ModelSpec, entries: Iterable[TensorEntry]) -> ParamCounts:
    """Count the weights of `entries` (a whole model's map); padding experts are none."""
    by_class: Counter[TensorClass] = Counter()
    idle = 0
    for entry in entries:
        shape = spec.real_shape(entry)
        by_class[entry.tensor_class] += prod(shape)
        idle += prod(shape[1:]) * (shape[0] - spec.moe.top_k) if entry.tensor_class in EXPERT_OWNED else 0
    total = sum(by_class.values())
    routed = sum(by_class[name] for name in EXPERT_OWNED)
    return ParamCounts(total, total - idle, routed, dict(by_class))


def describe_model(headers: CheckpointHeaders) -> dict[str, Any]:
    """What a report says of a checkpoint, from headers only: params_total, params_active, experts, top_k, bytes, ...

    Experts are per layer; of a padded student on average, and `experts_per_layer` has them all.

    Raises:
        InputRejected: the model is not supported, or its tensors do not fit its config.
    """
    family = family_of(headers.config)
    spec = family.spec(headers.config)
    counts = count_params(spec, family.tensors(headers.config, headers.tensors))
    uneven = spec.moe.experts_per_layer
    return {
        "family": spec.family,
        "layers": spec.layers,
        "params_total": counts.total,
        "params_active": counts.active,
        "params_routed": counts.routed,
        "experts": round(sum(uneven) / len(uneven)) if uneven else spec.moe.experts,
        "top_k": spec.moe.top_k,
        "bytes": headers.total_bytes,
    } | ({"experts_per_layer": list(uneven)} if uneven else {})
