"""Selection: from statistics to the ids of the experts that stay, the same number in every layer.

Every criterion is one row of CRITERIA: (statistics, how many stay, seed) -> {layer: ascending expert ids}. All are
deterministic; ties go to the lower id. No row is a default: which one wins depends on the model and is measured by
the plan.

Shape suffixes: L MoE layers, E experts.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moe_edge.formulas import saliency
from moe_edge.formulas.cka import cka_from_hsic
from moe_edge.formulas.saliency import RoutedSums

Kept = dict[int, list[int]]
Criterion = Callable[[RoutedSums, int, int], Kept]


def keep_highest(score_LE: Tensor, n_keep: int) -> Kept:
    """The `n_keep` highest scores of each layer, ascending ids; NaN ranks last, ties go to the lower id.

    Raises:
        ValueError: n_keep is not in 1..E.
    """
    _check_count(n_keep, score_LE.shape[1])
    ranked_LE = score_LE.double().nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
    return {layer: sorted(row[:n_keep].tolist()) for layer, row in enumerate(ranked_LE)}


def keep_diverse(score_LE: Tensor, cka_LEE: Tensor, n_keep: int) -> Kept:
    """Greedy: again and again the argmax of score x (1 - max CKA to the kept experts).

    The distance is 1 - clip(CKA, 0, 1), because debiased CKA may be negative; a NaN CKA means that the profile has no
    evidence about the pair, so it never makes an expert look redundant (distance 1). arXiv:2605.28207 and 2511.19822
    find diversity-aware selection best; the CKA is Song et al. 2012's debiased HSIC, normalised.

    Args: score_LE >= 0; cka_LEE symmetric.  Raises: ValueError: n_keep is not in 1..E.
    """
    _check_count(n_keep, score_LE.shape[1])
    distance_LEE = 1 - cka_LEE.double().nan_to_num(nan=0.0).clamp(0, 1)
    return {
        layer: _greedy(score_E.double().nan_to_num(nan=0.0), distance_EE, n_keep)
        for layer, (score_E, distance_EE) in enumerate(zip(score_LE, distance_LEE, strict=True))
    }


def _greedy(score_E: Tensor, distance_EE: Tensor, n_keep: int) -> list[int]:
    nearest_E = torch.ones_like(score_E)
    free_E = torch.ones_like(score_E, dtype=torch.bool)
    kept: list[int] = []
    for _ in range(n_keep):
        value_E = (score_E * nearest_E).where(free_E, -torch.inf)
        best = int((value_E == value_E.max()).nonzero()[0])  # the lower id on a tie, which argmax does not promise
        kept.append(best)
        free_E[best] = False
        nearest_E = torch.minimum(nearest_E, distance_EE[best])
    return sorted(kept)


def keep_random(layers: int, experts: int, n_keep: int, seed: int) -> Kept:
    """A seeded uniform choice, the baseline that every criterion must beat. The same seed keeps nested sets."""
    _check_count(n_keep, experts)
    generator = torch.Generator().manual_seed(seed)
    return {layer: sorted(torch.randperm(experts, generator=generator)[:n_keep].tolist()) for layer in range(layers)}


def _check_count(n_keep: int, experts: int) -> None:
    if not 1 <= n_keep <= experts:
        raise ValueError(f"cannot keep {n_keep} of {experts} experts")


def _by_score(score: Callable[[RoutedSums], Tensor], stats: RoutedSums, n_keep: int, seed: int) -> Kept:
    return keep_highest(score(stats), n_keep)


def _cka_diverse(stats: RoutedSums, n_keep: int, seed: int) -> Kept:
    return keep_diverse(saliency.ean(stats), cka_from_hsic(stats.gated_hsic_LEE), n_keep)


def _random(stats: RoutedSums, n_keep: int, seed: int) -> Kept:
    layers, experts = stats.counts_LE.shape
    return keep_random(layers, experts, n_keep, seed)


CRITERIA: dict[str, Criterion] = {
    "frequency": partial(_by_score, saliency.frequency),
    "gate-mass": partial(_by_score, saliency.gate_mass),
    "ean": partial(_by_score, saliency.ean),
    "man": partial(_by_score, saliency.man),
    "msan": partial(_by_score, saliency.msan),
    "reap": partial(_by_score, saliency.reap),
    "cka-diverse": _cka_diverse,
    "random": _random,
}


def select(criterion: str, stats: RoutedSums, n_keep: int, seed: int = 0) -> Kept:
    """The kept expert ids per layer under a criterion of CRITERIA. Raises KeyError for an unknown name."""
    return CRITERIA[criterion](stats, n_keep, seed)
