"""Merging experts: who goes into whom, whether the pair may, and how their neurons are brought together.

CKA finds redundancy up to rotation and scale, and a rotated copy cannot be averaged with its original. So a pair that CKA
proposes must pass two tests that are not invariant: the substitution error (can the kept expert, scaled, stand in for the
dropped one where that one was used?) and the error of the best static merge, which by REAP's theorem (arXiv:2510.13999) is
E[(g_i + g_j)^2 Var r ||f_i - f_j||^2] with r = g_i / (g_i + g_j), the router's mixing ratio.

Experts are equal up to a permutation of neurons, so neurons are matched before anything is averaged (Hungarian algorithm on
activations and weights, the cost of REAM, arXiv:2604.05356's merger; its PCA of the weights only saves time and is left
out).

Shape suffixes: L MoE layers, E experts, T tokens, D model, F expert width, W weights of a neuron (2D + D).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe_edge.formulas.cka import cka_from_hsic

MOST_MEMBERS = 15  # dropped experts per kept one: REAM caps its groups at 16 experts
LEAST_TOKENS = 16  # routed to the dropped expert: below it the tests say nothing
MOST_SUBSTITUTION_ERROR = 0.5  # share of the dropped expert's output energy that the kept one may miss
MOST_RATIO_ERROR = 0.1  # share of the pair's mixed output energy that a static merge may lose

Merges = dict[int, dict[int, int]]  # layer -> dropped -> kept


class ExpertSimilarity(Protocol):
    """What `assign_merges` reads of the profile's statistics, float64."""

    @property
    def hsic_LEE(self) -> Tensor: ...
    @property
    def gated_hsic_LEE(self) -> Tensor: ...
    @property
    def null_hsic_LEE(self) -> Tensor: ...


def assign_merges(stats: ExpertSimilarity, kept: Mapping[int, Sequence[int]]) -> Merges:
    """Every dropped expert with the kept one whose gated CKA to it is highest, most similar pairs first.

    A pair without evidence (NaN), or whose CKA is no larger than what shuffled tokens give somewhere in the layer, is left
    out: that expert is dropped. A kept expert takes at most MOST_MEMBERS. Ties go to the lower ids.

    Args:
        kept: position of the MoE layer -> kept expert ids. The result has the same keys.
    """
    gated_LEE, plain_LEE = cka_from_hsic(stats.gated_hsic_LEE), cka_from_hsic(stats.hsic_LEE)
    noise_L = null_ceiling(stats)
    return {
        layer: _assign_layer(gated_LEE[layer].where(plain_LEE[layer] > noise_L[layer], torch.nan), list(ids))
        for layer, ids in kept.items()
    }


def null_ceiling(stats: ExpertSimilarity) -> Tensor:
    """The largest |CKA| between an expert and another one with shuffled tokens, per layer [L]."""
    variance_LE = stats.hsic_LEE.double().diagonal(dim1=-2, dim2=-1).clamp(min=0)
    scale_LEE = torch.sqrt(variance_LE.unsqueeze(-1) * variance_LE.unsqueeze(-2))
    null_LEE = torch.where(scale_LEE > 0, stats.null_hsic_LEE.double() / scale_LEE, 0.0)
    null_LEE.diagonal(dim1=-2, dim2=-1).zero_()
    return null_LEE.abs().amax(dim=(1, 2))


def _assign_layer(cka_EE: Tensor, kept: list[int]) -> dict[int, int]:
    dropped = sorted(set(range(len(cka_EE))) - set(kept))
    pairs = [(-float(cka_EE[one, other]), one, other) for one in dropped for other in kept]
    members = dict.fromkeys(kept, 0)
    merges: dict[int, int] = {}
    for _, one, other in sorted(pair for pair in pairs if pair[0] < 0):  # NaN compares false
        if one not in merges and members[other] < MOST_MEMBERS:
            merges[one] = other
            members[other] += 1
    return dict(sorted(merges.items()))


@dataclass(frozen=True)
class PairTest:
    """The two tests of a pair, on calibration tokens."""

    substitution_error: float  # min_alpha ||f_j - alpha f_i||^2 / ||f_j||^2 over the tokens of the dropped expert j
    alpha: float
    ratio_error: float  # REAP's static-merge error over the energy of the pair's mixed output
    tokens: int  # routed to j

    @property
    def refusal(self) -> str | None:
        """Why the pair must not be merged, or None."""
        if self.tokens < LEAST_TOKENS:
            return f"only {self.tokens} tokens reached the dropped expert"
        if not self.substitution_error <= MOST_SUBSTITUTION_ERROR:
            return f"substitution error {self.substitution_error:.3f} exceeds {MOST_SUBSTITUTION_ERROR}"
        if not self.ratio_error <= MOST_RATIO_ERROR:
            return f"router-ratio error {self.ratio_error:.3f} exceeds {MOST_RATIO_ERROR}"
        return None


def substitution(kept_TD: Tensor, dropped_TD: Tensor) -> tuple[float, float]:
    """(min_alpha ||f_j - alpha f_i||^2 / ||f_j||^2, the alpha), sums over all tokens; (1, 0) without energy."""
    kept_TD, dropped_TD = kept_TD.double(), dropped_TD.double()
    energy, own = float(dropped_TD.square().sum()), float(kept_TD.square().sum())
    if energy <= 0 or own <= 0:
        return 1.0, 0.0
    product = float((kept_TD * dropped_TD).sum())
    return max(0.0, 1 - product**2 / (own * energy)), product / own


def ratio_error(gate_i_T: Tensor, gate_j_T: Tensor, out_i_TD: Tensor, out_j_TD: Tensor) -> float:
    """min_c E[(g_i + g_j)^2 (r - c)^2 ||f_i - f_j||^2] / E||g_i f_i + g_j f_j||^2 with r = g_i / (g_i + g_j).

    The best static merge is c f_i + (1 - c) f_j, so this is the share of the pair's output that no static merge keeps
    (REAP, arXiv:2510.13999). 0 where the outputs agree or the ratio is constant.

    Args: tokens that were routed to i or j; a gate is 0 where the token did not choose that expert.
    """
    gate_i_T, gate_j_T, out_i_TD, out_j_TD = (part.double() for part in (gate_i_T, gate_j_T, out_i_TD, out_j_TD))
    both_T = gate_i_T + gate_j_T
    mixed = float((gate_i_T.unsqueeze(1) * out_i_TD + gate_j_T.unsqueeze(1) * out_j_TD).square().sum())
    weight_T = both_T.square() * (out_i_TD - out_j_TD).square().sum(dim=1)
    total = float(weight_T.sum())
    if total <= 0 or mixed <= 0:
        return 0.0
    ratio_T = torch.where(both_T > 0, gate_i_T / both_T, 0.0)
    best = (weight_T * ratio_T).sum() / total
    return float((weight_T * (ratio_T - best).square()).sum()) / mixed


def neuron_matching(
    act_TF: Tensor, other_act_TF: Tensor, weights_FW: Tensor, other_weights_FW: Tensor
) -> tuple[Tensor, float]:
    """The order of the other expert's neurons that brings them next to the first one's: `other[order]` ~ first.

    The cost of a pair of neurons is the distance of their activations over the tokens plus the distance of their weights,
    each divided by its mean, so that both count alike.

    Returns:
        (order [F] int64, mean cost of the matched pairs over the mean cost of all pairs; 0 = identical neurons).
    """
    cost_FF = _distances(act_TF.T, other_act_TF.T) + _distances(weights_FW, other_weights_FW)
    rows, columns = linear_sum_assignment(cost_FF.cpu().numpy())
    mean = float(cost_FF.mean())
    matched = float(cost_FF[torch.from_numpy(rows), torch.from_numpy(columns)].mean())
    return torch.from_numpy(columns), matched / mean if mean > 0 else 0.0


def _distances(rows_FX: Tensor, other_FX: Tensor) -> Tensor:
    distance_FF = torch.cdist(rows_FX.double(), other_FX.double())
    mean = distance_FF.mean()
    return distance_FF / mean if mean > 0 else distance_FF
