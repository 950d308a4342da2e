"""Different numbers of experts in different layers: how a total is dealt out by a criterion's score.

Scores of different layers are in different units (norms grow with depth), so every expert counts by its share of its own
layer's total score. A layer whose score sits in few experts gives up the others first; one that uses all of them alike
keeps them longest. What is dealt out is the next best expert of a layer (of each of its router's groups, which must stay
equally large), the largest share first: a threshold on the shares, within bounds that every layer respects.

Which experts a layer keeps is the criterion's own order (selection.py). A criterion that ranks without a score, by diversity,
deals by the score that it weighs diversity with; "random" deals evenly, as a baseline without knowledge must.

Shape suffixes: L MoE layers, E experts, U units: one expert of each group.
"""

from collections.abc import Callable, Sequence
from math import ceil

import torch
from torch import Tensor

from moe_edge.formulas import saliency
from moe_edge.formulas.saliency import RoutedSums
from moe_edge.formulas.selection import KeptByPosition, keep_prefix

LEAST_SHARE = 0.5  # of the average number of experts, which every layer keeps
SCORES: dict[str, Callable[[RoutedSums], Tensor]] = {
    "frequency": saliency.frequency,
    "gate-mass": saliency.gate_mass,
    "ean": saliency.ean,
    "gated-ean": saliency.gated_ean,
    "man": saliency.man,
    "msan": saliency.msan,
    "reap": saliency.reap,
    "loo-mse": saliency.loo_mse,
    "aimer": saliency.aimer,
    "cka-diverse": saliency.ean,
    "cka-dopt": saliency.ean,
}


def score_shares(criterion: str, stats: RoutedSums) -> Tensor:
    """Every expert's share of its layer's score, [L, E] float64, rows sum to 1; all alike where nothing is known."""
    score = SCORES.get(criterion)
    score_LE = (
        torch.ones(stats.counts_LE.shape).double() if score is None else score(stats).double().nan_to_num(nan=0.0)
    )
    total_L1 = score_LE.sum(dim=1, keepdim=True)
    return (score_LE / total_L1).where(total_L1 > 0, 1 / score_LE.shape[1])


def bounds(average: int, possible: Sequence[int], most: int | None = None) -> tuple[int, int]:
    """The fewest and the most experts of a layer.

    Args:
        possible: the numbers that a layer can keep, ascending.
        most: an upper bound from elsewhere; never below the average.
    """
    fewest = next(count for count in possible if count >= min(average, ceil(LEAST_SHARE * average)))
    return fewest, possible[-1] if most is None else max(most, average)


def deal(share_LE: Tensor, average: int, fewest: int, most: int, groups: int = 1) -> list[int]:
    """How many experts every layer keeps, `average` of them on average.

    Args:
        fewest, most: of every layer; multiples of the groups, as is the average.

    Raises:
        ValueError: the average is not between the two, or something is no multiple of the groups.
    """
    layers, experts = share_LE.shape
    if not fewest <= average <= most <= experts or any(count % groups for count in (average, fewest, most, experts)):
        raise ValueError(f"cannot deal {average} experts per layer between {fewest} and {most} in {groups} group(s)")
    sorted_LGE = share_LE.reshape(layers, groups, -1).sort(dim=2, descending=True).values
    worth_LU = sorted_LGE.sum(dim=1)[:, fewest // groups : most // groups]
    units = [(-worth, unit, layer) for layer, row in enumerate(worth_LU.tolist()) for unit, worth in enumerate(row)]
    counts = [fewest] * layers
    for _, _, layer in sorted(units)[: layers * (average - fewest) // groups]:
        counts[layer] += groups
    return counts


def keep_uneven(order_LE: Tensor, counts: Sequence[int], groups: int = 1) -> KeptByPosition:
    """The first experts of each layer's order, as many as `counts` says, as ascending ids; errors as `keep_prefix`."""
    pairs = enumerate(zip(order_LE, counts, strict=True))
    return {layer: keep_prefix(order_E[None], count, groups)[0] for layer, (order_E, count) in pairs}
