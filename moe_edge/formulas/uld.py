"""Distillation between two vocabularies: where two tokenizations of one text meet, and how far apart two next-token
distributions over different tokens are.

Where both tokenizations end a token at the same byte, both models have read the same text and predict what follows.
There are two ways to compare what they predict.

`hybrid_distance`: tokens that are the same bytes in both vocabularies are compared one by one, as a KL with one more
outcome for all others; the others by rank: the L1 distance of their sorted probabilities (Universal Logit Distillation,
Boizard et al. 2024, arXiv 2402.12030, eq. 6: the Wasserstein distance under a cost that knows no identity). TRL's GOLD
weighs the two parts by the share of the vocabulary that matches; here each weighs as much as the probability it moves.
Rank tells the student how sure to be, not of what: without cross-entropy beside it, texts may become less likely.

`projected_kl`: a teacher's token begins with a token of the student, and that is where its probability goes. One case is
wrong by that: the student's next token in the text is longer than the teacher's. Its probability is known by the chain
rule, from the teacher's tokens up to the place where both meet again, and is moved there.

With equal vocabularies both are the plain KL.

Shape suffixes: T positions, V teacher vocabulary, W student vocabulary, M matched tokens, U unmatched tokens of either
side, A and B tokens of the two tokenizations.
"""

from dataclasses import dataclass

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
    sides = [_logprobs(logits, temperature) for logits in (teacher_TV, student_TW)]
    left = [_unmatched(side, matched_M2[:, column]).exp() for column, side in enumerate(sides)]
    return matched_kl(sides[0], sides[1], matched_M2) + sorted_distance(left[0], left[1])


@dataclass(frozen=True)
class NextSpan:
    """What follows in the text at each position, up to the next place where both tokenizations meet."""

    student_T: Tensor  # the student's next token
    teacher_T: Tensor  # the teacher's next token
    rest_T: Tensor  # the teacher's log-probability of its further tokens of the span; -inf where they never meet again

    def __getitem__(self, part: slice) -> "NextSpan":
        return NextSpan(self.student_T[part], self.teacher_T[part], self.rest_T[part])


def projected_kl(
    teacher_TV: Tensor, student_TW: Tensor, begins_V: Tensor, span: NextSpan, temperature: float = 1.0
) -> Tensor:
    """KL(the teacher's distribution over the student's next token || the student's) in nats per position, [T].

    Args:
        teacher_TV, student_TW: logits, padding columns already dropped.
        begins_V: the student's token that each of the teacher's begins with; -1 = none, left out.
    """
    target_TW = _projected(_logprobs(teacher_TV, temperature).exp(), student_TW.shape[-1], begins_V, span)
    student_TW = _logprobs(student_TW, temperature)
    kl_T: Tensor = (torch.special.xlogy(target_TW, target_TW) - target_TW * student_TW).sum(dim=-1)
    return kl_T


def _projected(teacher_TV: Tensor, width: int, begins_V: Tensor, span: NextSpan) -> Tensor:
    """Probabilities over the student's vocabulary, [T, W]; rows sum to one."""
    row_T, begins_T = torch.arange(len(teacher_TV), device=teacher_TV.device), begins_V[span.teacher_T]
    target_TW = teacher_TV.new_zeros(len(teacher_TV), width)
    target_TW.index_add_(1, begins_V.clamp_min(0), teacher_TV * (begins_V >= 0))
    moved_T = teacher_TV[row_T, span.teacher_T] * span.rest_T.to(teacher_TV.dtype).exp() * (begins_T >= 0)
    target_TW[row_T, begins_T.clamp_min(0)] -= moved_T
    target_TW[row_T, span.student_T] += moved_T
    target_TW.clamp_min_(0)
    return target_TW / target_TW.sum(dim=-1, keepdim=True)


def _logprobs(logits_TV: Tensor, temperature: float) -> Tensor:
    at_least_float32 = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return torch.log_softmax(at_least_float32 / temperature, dim=-1)


def _unmatched(values_TV: Tensor, matched_M: Tensor) -> Tensor:
    """The columns that are not matched, in their order."""
    free_V = torch.ones(values_TV.shape[-1], dtype=torch.bool, device=values_TV.device)
    free_V[matched_M] = False
    return values_TV[:, free_V]
