"""Selection: from statistics to an order of the experts, and from an order to the ids that stay.

Every criterion is one row of CRITERIA: (statistics, seed) -> the experts of each layer, best first. What stays is a
prefix of that order, so the plans of one criterion are nested by construction: the experts kept at 50 % are a subset
of those kept at 75 %. All are deterministic; ties go to the lower id. No row is a default: which one wins depends on
the model and is measured by the plan.

Layers are positions 0..L-1 among the MoE layers, as in the statistics.

Shape suffixes: L MoE layers, E experts.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moe_edge.formulas import saliency
from moe_edge.formulas.cka import cka_from_hsic
from moe_edge.formulas.saliency import RoutedSums

KeptByPosition = dict[int, list[int]]
Criterion = Callable[[RoutedSums, int], Tensor]

FLOOR = 1e-3  # the least share of its score that a copy keeps, so that among copies the score decides


def order_by_score(score_LE: Tensor) -> Tensor:
    """Experts by descending score, [L, E] int64; NaN ranks last, ties go to the lower id."""
    return score_LE.double().nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)


def order_diverse(score_LE: Tensor, cka_LEE: Tensor) -> Tensor:
    """Greedy: again and again the argmax of score x (1 - max CKA to those already chosen), [L, E] int64.

    The distance is 1 - clip(CKA, 0, 1), because debiased CKA may be negative. A NaN CKA means that there is no
    evidence about the pair; such a pair says nothing, so it is left out of the maximum. arXiv:2605.28207 and
    2511.19822 find diversity-aware selection best; the CKA is Song et al. 2012's debiased HSIC, normalised.

    Args: score_LE >= 0, NaN ranks last; cka_LEE symmetric.
    """
    distance_LEE = (1 - cka_LEE.double().clamp(0, 1)).nan_to_num(nan=1.0).clamp(min=FLOOR)
    nearest_LE = torch.ones_like(distance_LEE[:, 0])

    def value(chosen_L: Tensor | None) -> Tensor:
        nonlocal nearest_LE
        if chosen_L is not None:
            nearest_LE = torch.minimum(nearest_LE, _rows(distance_LEE, chosen_L))
        return score_LE.double() * nearest_LE

    return _greedy(value, *score_LE.shape)


def order_d_optimal(score_LE: Tensor, cka_LEE: Tensor) -> Tensor:
    """Greedy D-optimal design: each step adds the expert that raises log det of the chosen block of S K S most.

    K is the CKA matrix, S = diag(score): the determinant is the squared volume spanned by the chosen experts'
    features, each as long as its score, so that an expert counts only with what those before it do not explain
    *together* (`order_diverse` asks for the nearest one alone). The gain is score^2 x the residual of K after a
    pivoted Cholesky step (fast greedy MAP of a determinantal process, Chen et al. 2018, arXiv:1709.05135, algorithm
    1); D-optimal expert selection: arXiv:2605.28207. K is positive semidefinite, because debiased HSIC sums are inner
    products of U-centred Gram matrices; a residual is never taken below FLOOR, which rounding would turn into noise.

    Args: score_LE >= 0, NaN ranks last; cka_LEE symmetric; a NaN pair (no evidence) counts as unexplained.
    """
    kernel_LEE = cka_LEE.double().nan_to_num(nan=0.0)
    residual_LE = torch.ones_like(kernel_LEE[:, 0])
    factors: list[Tensor] = []  # columns of the Cholesky factor, one per step, [L, E]

    def value(chosen_L: Tensor | None) -> Tensor:
        nonlocal residual_LE
        if chosen_L is not None:
            at_L1 = chosen_L[:, None]
            explained_LE = sum((column * column.gather(1, at_L1) for column in factors), torch.zeros(()))
            column_LE = (_rows(kernel_LEE, chosen_L) - explained_LE) / residual_LE.gather(1, at_L1).sqrt()
            factors.append(column_LE)
            residual_LE = (residual_LE - column_LE.square()).clamp(min=FLOOR)
        return score_LE.double().square() * residual_LE

    return _greedy(value, *score_LE.shape)


def _rows(square_LEE: Tensor, chosen_L: Tensor) -> Tensor:
    """Row `chosen_L[l]` of every layer's matrix, [L, E]."""
    return square_LEE[torch.arange(len(chosen_L)), chosen_L]


def _greedy(value: Callable[[Tensor | None], Tensor], layers: int, experts: int) -> Tensor:
    """All experts in the order in which the greedy takes them.

    Args:
        value: [L, E] values of the experts, given the one that was chosen last in every layer (None at first).
    """
    ids_E = torch.arange(experts)
    free_LE = torch.ones(layers, experts, dtype=torch.bool)
    chosen_L: Tensor | None = None
    order = []
    for _ in range(experts):
        value_LE = value(chosen_L).nan_to_num(nan=-1.0).where(free_LE, -torch.inf)
        best_LE = value_LE == value_LE.amax(dim=1, keepdim=True)
        chosen_L = torch.where(best_LE, ids_E, experts).amin(dim=1)  # the lower id on a tie: argmax promises nothing
        free_LE[torch.arange(layers), chosen_L] = False
        order.append(chosen_L)
    return torch.stack(order, dim=1)


def order_random(layers: int, experts: int, seed: int) -> Tensor:
    """A seeded uniform order per layer, the baseline that every criterion must beat."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(experts, generator=generator) for _ in range(layers)])


def expert_cka(stats: RoutedSums) -> Tensor:
    """Gate-weighted CKA between the experts of each layer; NaN where an expert saw no token: no evidence, not 0."""
    cka_LEE = cka_from_hsic(stats.gated_hsic_LEE)
    unrouted_LE = stats.counts_LE == 0
    return cka_LEE.masked_fill(unrouted_LE.unsqueeze(1) | unrouted_LE.unsqueeze(2), torch.nan)


def _by_score(score: Callable[[RoutedSums], Tensor], stats: RoutedSums, seed: int) -> Tensor:
    return order_by_score(score(stats))


def _by_diversity(order: Callable[[Tensor, Tensor], Tensor], stats: RoutedSums, seed: int) -> Tensor:
    return order(saliency.ean(stats), expert_cka(stats))


def _random(stats: RoutedSums, seed: int) -> Tensor:
    layers, experts = stats.counts_LE.shape
    return order_random(layers, experts, seed)


CRITERIA: dict[str, Criterion] = {
    "frequency": partial(_by_score, saliency.frequency),
    "gate-mass": partial(_by_score, saliency.gate_mass),
    "ean": partial(_by_score, saliency.ean),
    "gated-ean": partial(_by_score, saliency.gated_ean),
    "man": partial(_by_score, saliency.man),
    "msan": partial(_by_score, saliency.msan),
    "reap": partial(_by_score, saliency.reap),
    "loo-mse": partial(_by_score, saliency.loo_mse),
    "aimer": partial(_by_score, saliency.aimer),
    "cka-diverse": partial(_by_diversity, order_diverse),
    "cka-dopt": partial(_by_diversity, order_d_optimal),
    "random": _random,
}
NEEDS_EVIDENCE_BLOCKS = ("loo-mse", "cka-diverse", "cka-dopt")  # criteria that read sums over the CKA tokens


def rank(criterion: str, stats: RoutedSums, seed: int = 0, guard_LE: Tensor | None = None) -> Tensor:
    """The experts of each layer, best first, under a criterion of CRITERIA, [L, E] int64.

    Args:
        seed: of "random".
        guard_LE: True = keep under every criterion; these come first, in the criterion's own order. "random" ignores
            it, because a baseline with knowledge is none.

    Raises:
        KeyError: an unknown criterion.
    """
    order_LE = CRITERIA[criterion](stats, seed)
    return order_LE if guard_LE is None or criterion == "random" else first_in_order(order_LE, guard_LE)


def first_in_order(order_LE: Tensor, chosen_LE: Tensor) -> Tensor:
    """The same order with the chosen experts (True) before all others, [L, E]."""
    ranked_LE = chosen_LE.gather(1, order_LE)
    return order_LE.gather(1, ranked_LE.int().argsort(dim=1, descending=True, stable=True))


def keep_prefix(order_LE: Tensor, n_keep: int, groups: int = 1) -> KeptByPosition:
    """The first `n_keep` experts of each layer's order, as ascending ids.

    Args:
        groups: the router's contiguous groups of experts; each keeps its own first n_keep / groups, because a
            group-limited router needs groups of equal size.

    Raises:
        ValueError: n_keep is not in 1..E, or is not a multiple of the groups.
    """
    experts = order_LE.shape[1]
    if not 1 <= n_keep <= experts or n_keep % groups or experts % groups:
        raise ValueError(f"cannot keep {n_keep} of {experts} experts in {groups} group(s)")
    size, share = experts // groups, n_keep // groups
    kept: KeptByPosition = {}
    for layer, order_E in enumerate(order_LE):
        group_E = order_E // size
        kept[layer] = sorted(int(e) for g in range(groups) for e in order_E[group_E == g][:share])
    return kept


def select(
    criterion: str,
    stats: RoutedSums,
    n_keep: int,
    seed: int = 0,
    *,
    groups: int = 1,
    guard_LE: Tensor | None = None,
) -> KeptByPosition:
    """The kept expert ids per layer under a criterion: a prefix of its order. Arguments and errors as `rank` and
    `keep_prefix`."""
    return keep_prefix(rank(criterion, stats, seed, guard_LE), n_keep, groups)
