"""Divergences between a teacher's and a student's distribution over the same categories, in nats per token; the forward
KL is in divergence.py.

The categories are the whole vocabulary, or a teacher's top-k with one bucket for everything else: these formulas do not
ask. On a coarse-graining every f-divergence is a lower bound of its value on the vocabulary (data processing).

Where the teacher gives no mass its log-probability is floored at LOG_FLOOR, so that a student who visits such a place is
punished hard but finitely.

Shape suffixes: T tokens, C categories. p is the teacher, q the student, both as log-probabilities.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LOG_FLOOR = -30.0  # nats; float32 cannot tell 1e-13 from 0 beside 1 anyway


def reverse_kl(p_TC: Tensor, q_TC: Tensor) -> Tensor:
    """KL(q || p), [T]; seeks the teacher's modes (MiniLLM, arXiv 2306.08543, eq. 1)."""
    return _expected(q_TC, q_TC - p_TC.clamp_min(LOG_FLOOR))


def jsd(p_TC: Tensor, q_TC: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, [T] (GKD, arXiv 2306.13649, eq. 1)."""
    mixed_TC = _mixture(p_TC, q_TC, beta)
    return beta * _expected(p_TC, p_TC - mixed_TC) + (1 - beta) * _expected(q_TC, q_TC - mixed_TC)


def skew_kl(p_TC: Tensor, q_TC: Tensor, skew: float = 0.1) -> Tensor:
    """KL(p || skew p + (1 - skew) q), [T]: its gradient stays bounded (DistiLLM, arXiv 2402.03898, eq. 4)."""
    return _expected(p_TC, p_TC - _mixture(p_TC, q_TC, skew))


def skew_reverse_kl(p_TC: Tensor, q_TC: Tensor, skew: float = 0.1) -> Tensor:
    """KL(q || (1 - skew) p + skew q), [T] (same paper)."""
    return _expected(q_TC, q_TC - _mixture(p_TC, q_TC, 1 - skew))


def total_variation(p_TC: Tensor, q_TC: Tensor) -> Tensor:
    """Half of the L1 distance of the probabilities, [T], between 0 and 1."""
    return 0.5 * (p_TC.exp() - q_TC.exp()).abs().sum(-1)


def divergences(jsd_beta: float, skew: float) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Every divergence but the forward KL by the name that a recipe gives it, its constants filled in."""
    return {
        "reverse_kl": reverse_kl,
        "jsd": lambda p_TC, q_TC: jsd(p_TC, q_TC, jsd_beta),
        "skew_kl": lambda p_TC, q_TC: skew_kl(p_TC, q_TC, skew),
        "skew_reverse_kl": lambda p_TC, q_TC: skew_reverse_kl(p_TC, q_TC, skew),
        "tvd": total_variation,
    }


def _mixture(p_TC: Tensor, q_TC: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), without leaving logarithms; floored, so that its slope is one where both vanish."""
    share_ = torch.tensor(share, dtype=q_TC.dtype, device=q_TC.device)
    p_TC, q_TC = p_TC.clamp_min(2 * LOG_FLOOR), q_TC.clamp_min(2 * LOG_FLOOR)
    return torch.logaddexp(p_TC + share_.log(), q_TC + torch.log1p(-share_))


def _expected(weights_TC: Tensor, values_TC: Tensor) -> Tensor:
    """sum exp(w) v, [T]; categories without weight count as nothing, and round-off below zero as zero."""
    mass_TC = weights_TC.exp()
    total_T = torch.where(mass_TC > 0, mass_TC * values_TC, 0.0).sum(-1)
    return total_T + (total_T.clamp_min(0) - total_T).detach()
