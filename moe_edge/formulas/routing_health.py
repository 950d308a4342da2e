"""Routing health: is the load spread over the experts, and has pruning or training made the router collapse?

All are pure functions of two sums over the same tokens: how many were routed to each expert, and the gate weights with
which they were mixed in. Compare a teacher with its student on the same text: fewer experts must carry more load, but its
spread relative to an even one should stay.

Shape suffixes: L MoE layers, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

MOST_OVER_FAIR = 4.0  # times its even share that one expert may carry; 64 experts top-8: half of all tokens
LEAST_ENTROPY = 0.6  # of an even load's


@dataclass(frozen=True)
class LayerHealth:
    """One layer's routing; None where nothing was routed."""

    load_entropy: float | None  # 1 = even, 0 = one expert carries all
    variation: float | None  # coefficient of variation of the load, 0 = even
    largest_over_fair: float | None  # load of the busiest expert over an even share
    dead_experts: list[int]  # no token
    gate_mass: float | None  # mean over tokens of the sum of the mixing weights
    alarm: str | None  # why the layer looks collapsed


def load_entropy(counts_LE: Tensor) -> Tensor:
    """Entropy of the load over the entropy of an even one, in [0, 1]; NaN without tokens, 1 with a single expert. [L]."""
    load_LE = _load(counts_LE)
    experts = counts_LE.shape[1]
    entropy_L = -torch.special.xlogy(load_LE, load_LE).sum(dim=1)
    return entropy_L / log(experts) if experts > 1 else torch.ones_like(entropy_L)


def load_variation(counts_LE: Tensor) -> Tensor:
    """Standard deviation of the experts' loads over their mean (Shazeer et al. 2017, arXiv:1701.06538, eq. 7). [L]."""
    return counts_LE.double().std(dim=1, correction=0) / counts_LE.double().mean(dim=1)


def largest_over_fair(counts_LE: Tensor) -> Tensor:
    """Load of the busiest expert over an even share, 1..E. [L]. Top-k routing bounds it by E/K."""
    return _load(counts_LE).amax(dim=1) * counts_LE.shape[1]


def _load(counts_LE: Tensor) -> Tensor:
    return counts_LE.double() / counts_LE.double().sum(dim=1, keepdim=True)


def gate_share_kept(gate_sum_LE: Tensor, kept: Mapping[int, Sequence[int]]) -> Tensor:
    """Share of the teacher's gate mass that went to the kept experts, by position 0..L-1. [L]; NaN without tokens."""
    held = [gate_sum_LE[layer, list(kept[layer])].double().sum() for layer in range(len(gate_sum_LE))]
    return torch.stack(held) / gate_sum_LE.double().sum(dim=1)


def layer_health(
    counts_LE: Tensor,
    gate_sum_LE: Tensor,
    tokens: int,
    *,
    most_over_fair: float = MOST_OVER_FAIR,
    least_entropy: float = LEAST_ENTROPY,
) -> list[LayerHealth]:
    """Everything above per layer, with the collapse alarm.

    Args:
        counts_LE, gate_sum_LE: routed tokens and sums of their mixing weights.
        tokens: how many went through every layer.
        most_over_fair, least_entropy: the alarm's limits; it rings when either is crossed.
    """
    columns = (load_entropy(counts_LE), load_variation(counts_LE), largest_over_fair(counts_LE))
    mass_L = gate_sum_LE.double().sum(dim=1) / tokens if tokens else torch.full((len(counts_LE),), torch.nan)
    health = []
    for layer, (entropy, variation, largest) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        if not int(counts_LE[layer].sum()):
            health.append(LayerHealth(None, None, None, [], None, "nothing was routed"))
            continue
        dead = (counts_LE[layer] == 0).nonzero().flatten().tolist()
        alarm = _alarm(entropy, largest, most_over_fair, least_entropy)
        health.append(LayerHealth(entropy, variation, largest, dead, float(mass_L[layer]), alarm))
    return health


def _alarm(entropy: float, largest: float, most_over_fair: float, least_entropy: float) -> str | None:
    if largest > most_over_fair:
        return f"one expert carries {largest:.1f} times its even share (limit {most_over_fair:g})"
    if entropy < least_entropy:
        return f"load entropy is {entropy:.2f} of an even load's (limit {least_entropy:g})"
    return None
