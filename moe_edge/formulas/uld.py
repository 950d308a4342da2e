"""Distillation between two vocabularies: where two tokenizations of one text meet, and how far apart two next-token
distributions are that share some tokens only.

Where both tokenizations end a token at the same byte, both models have read the same text and predict what follows. There
the tokens that are the same bytes in both vocabularies are compared one by one, as a KL with one more outcome for all
others; the others, which have no counterpart, are compared by rank: the L1 distance of their sorted probabilities
(Universal Logit Distillation, Boizard et al. 2024, arXiv 2402.12030, eq. 6: the Wasserstein distance under a cost that
knows no identity). With equal vocabularies this is the plain KL, with disjoint ones plain ULD. TRL's GOLD weighs the two
parts by the share of the vocabulary that matches; here each weighs as much as the probability it moves.

Shape suffixes: T positions, V teacher vocabulary, W student vocabulary, M matched tokens, U unmatched tokens of either
side, A and B tokens of the two tokenizations.
"""

import torch
from torch import Tensor
from torch.nn import functional


def shared_boundaries(ends_A: Tensor, ends_B: Tensor) -> Tensor:
    """Pairs (a, b), int64 [pairs, 2]: after token a of one tokenization and token b of the other, the same text was read.

    Args:
        ends_A, ends_B: byte offset at which each token ends, ascending; where tokens are empty the last one counts.
    """
    if not len(ends_A) or not len(ends_B):
        return ends_A.new_zeros(0, 2)
    last_A = torch.ones_like(ends_A, dtype=torch.bool)
    last_A[:-1] = ends_A[1:] > ends_A[:-1]
    place_A = torch.searchsorted(ends_B, ends_A, right=True) - 1
    met_A = last_A & (place_A >= 0)
    met_A &= ends_B[place_A.clamp_min(0)] == ends_A
    a = met_A.nonzero().squeeze(-1)
    return torch.stack([a, place_A[a]], dim=-1)


def sorted_distance(one_TU: Tensor, other_TU: Tensor) -> Tensor:
    """L1 distance of sorted probabilities per position, [T]; the shorter list is filled up with zeros."""
    width = max(one_TU.shape[-1], other_TU.shape[-1])
    lists = [
        functional.pad(side_TU.sort(dim=-1, descending=True).values, (0, width - side_TU.shape[-1]))
        for side_TU in (one_TU, other_TU)
    ]
    return (lists[0] - lists[1]).abs().sum(dim=-1)


def matched_kl(teacher_TV: Tensor, student_TW: Tensor, matched_M2: Tensor) -> Tensor:
    """KL(teacher || student) in nats per position over the matched tokens and one outcome for all others, [T].

    A student without other tokens can only learn the teacher's conditional distribution on the matched ones.

    Args:
        teacher_TV, student_TW: log-probabilities.
        matched_M2: (teacher id, student id) of tokens that are the same bytes.
    """
    teacher_TM, student_TM = teacher_TV[:, matched_M2[:, 0]], student_TW[:, matched_M2[:, 1]]
    left = [_unmatched(side, matched_M2[:, column]) for column, side in enumerate((teacher_TV, student_TW))]
    if not left[1].shape[-1]:
        teacher_TM = torch.log_softmax(teacher_TM, dim=-1)
    kl_T = (teacher_TM.exp() * (teacher_TM - student_TM)).sum(dim=-1)
    if left[0].shape[-1] and left[1].shape[-1]:
        teacher_T, student_T = (side_TU.logsumexp(dim=-1) for side_TU in left)
        kl_T = kl_T + teacher_T.exp() * (teacher_T - student_T)
    return kl_T


def hybrid_distance(teacher_TV: Tensor, student_TW: Tensor, matched_M2: Tensor, temperature: float = 1.0) -> Tensor:
    """`matched_kl` plus `sorted_distance` of the unmatched tokens, per position, [T] float32 at least.

    Args:
        teacher_TV, student_TW: logits, padding columns already dropped.
    """
    sides = []
    for logits in (teacher_TV, student_TW):
        at_least_float32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
        sides.append(torch.log_softmax(at_least_float32 / temperature, dim=-1))
    left = [_unmatched(side, matched_M2[:, column]).exp() for column, side in enumerate(sides)]
    return matched_kl(sides[0], sides[1], matched_M2) + sorted_distance(left[0], left[1])


def _unmatched(values_TV: Tensor, matched_M: Tensor) -> Tensor:
    """The columns that are not matched, in their order."""
    free_V = torch.ones(values_TV.shape[-1], dtype=torch.bool, device=values_TV.device)
    free_V[matched_M] = False
    return values_TV[:, free_V]
