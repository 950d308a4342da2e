"""KL divergences between teacher and student: dense, and from a top-k cache with an exact tail bucket.

Why a tail bucket: training on a truncated teacher as if it were whole (renormalised, or with its tail
set to zero) moves the optimum to p / P on the kept ids and to nothing elsewhere. Here everything outside
the teacher's top-k is one more outcome whose mass is known exactly, so that the loss is the KL of the
coarse-grained distributions: never negative, a lower bound of the full KL, and with the full KL's own
gradient q - p on the kept ids (Hinton et al. 2015, arXiv 1503.02531, eq. 2, for the soft targets).

The tail mass at temperature T is no function of the top-k at T = 1, so it is captured for a list of
temperatures while the whole distribution is there, and other temperatures are refused.

Shape suffixes: T tokens, V vocabulary, K kept ids per token, H temperatures.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moe_edge.contracts.errors import ConfigError
from moe_edge.formulas.logit_views import LogitView, wide

CACHED_LOGITS = 1 << 17  # logits in one chunk of teacher_topk, which stay in the processor's cache
CHUNK_TOKENS = 128
IGNORED_LABEL = -100
LOG_NOTHING = -104.0  # exp of it is 0 in float32, and 0 times it is 0: stands for the log of an empty tail
TAIL_LIMIT = 1 - 1e-6  # a tail mass is kept below one by float32's resolution


class TopK(NamedTuple):
    """What is kept of a teacher: descending log-probabilities at T = 1, their ids, log tail masses."""

    logprobs_TK: Tensor  # float32, nats
    indices_TK: Tensor  # int64
    tail_logmass_TH: Tensor  # float32, nats; log of the mass outside K at each temperature


def teacher_topk(logits_TV: Tensor, k: int, temperatures: Sequence[float], vocab: int | None = None) -> TopK:
    """The k likeliest ids of every token and the exact mass of all others at each temperature.

    Args:
        logits_TV: raw logits; any float type.
        k: kept ids, capped at the vocabulary.
        temperatures: those at which the tail mass is wanted.
        vocab: true vocabulary; columns beyond it are padding and are dropped. None: all are real.
    """
    real_TV = logits_TV[:, :vocab]
    rows = max(CACHED_LOGITS // max(real_TV.shape[-1], 1), 1)
    parts = [_topk_chunk(chunk_tV.float(), k, (1.0, *temperatures)) for chunk_tV in torch.split(real_TV, rows)]
    values_TK, indices_TK, tail_TH = (torch.cat(column) for column in zip(*parts, strict=True))
    logprobs_TK = values_TK - values_TK[:, :1]
    heat_H = torch.tensor([1.0, *temperatures], device=logits_TV.device)
    top_TH = torch.logsumexp(logprobs_TK.unsqueeze(-1) / heat_H, dim=1)
    tail_TH = tail_TH + logprobs_TK[:, -1:] / heat_H
    log_all_TH = torch.logaddexp(tail_TH, top_TH)
    return TopK(logprobs_TK - log_all_TH[:, :1], indices_TK, (tail_TH - log_all_TH)[:, 1:])


def _topk_chunk(logits_tV: Tensor, k: int, temperatures: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Kept logits and ids, and the log of the tail's sum of exp((z - least kept) / T).

    One exponential per temperature at most: where 2T is there too, exp(z/T) is the square of exp(z/(2T)).
    """
    values_tK, indices_tK = logits_tV.topk(min(k, logits_tV.shape[-1]), dim=-1)
    tail_tV = (logits_tV - values_tK[:, -1:]).scatter_(-1, indices_tK, -torch.inf)
    powers: dict[float, Tensor] = {}
    for temperature in sorted(set(temperatures), reverse=True):
        half = powers.get(2 * temperature)
        powers[temperature] = torch.exp(tail_tV / temperature) if half is None else half.square()
    log_tail_tH = torch.stack([powers[temperature].sum(-1).log() for temperature in temperatures], dim=-1)
    return values_tK, indices_tK, log_tail_tH


def temperature_index(temperature: float, temperatures: Sequence[float]) -> int:
    """The position of `temperature` among those whose tail mass is stored.

    Raises:
        ConfigError: it is not among them; nothing can be computed exactly from a truncated cache.
    """
    for index, stored in enumerate(temperatures):
        if abs(stored - temperature) < 1e-6:
            return index
    raise ConfigError(
        f"temperature {temperature:g} is not in the logit cache",
        where="distill.temperature",
        why=f"exact tail masses are stored for {', '.join(f'{t:g}' for t in temperatures)} only",
        next_command="choose one of these, or add it to profile.logits.temperatures",
    )


def tempered(logprobs_TK: Tensor, tail_logmass_T: Tensor, temperature: float) -> Tensor:
    """Log-probabilities on K at `temperature`, float32 [T, K], that with the tail sum to one exactly.

    Args:
        logprobs_TK: log-probabilities at T = 1 (only their differences matter).
        tail_logmass_T: log mass outside K at `temperature`.
    """
    conditional_TK = torch.log_softmax(wide(logprobs_TK) / temperature, dim=-1)
    head_T = torch.log1p(-torch.exp(wide(tail_logmass_T)).clamp(max=TAIL_LIMIT))
    return conditional_TK + head_T.unsqueeze(-1)


def coarse_pair(
    student: LogitView, indices_TK: Tensor, logprobs_TK: Tensor, tail_logmass_T: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student at `temperature` over the k kept ids and, last, one tail bucket.

    Both sum to one over C = K + 1 outcomes; where all ids are kept there is no tail and C = K. An empty tail of the
    teacher is LOG_NOTHING, so that p log p is 0 and no divergence of the pair is NaN.

    Args:
        student: the student's logits, at least those of the kept ids and the log-sum-exp of the rest.
        indices_TK, logprobs_TK: the teacher's kept ids and log-probabilities at T = 1.
        tail_logmass_T: the teacher's log mass outside K at `temperature`.

    Returns:
        (teacher, student), each [T, C], float32 or the wider dtype of what was given.
    """
    if indices_TK.shape[-1] == student.vocab:
        return head_pair(student, indices_TK, logprobs_TK, temperature)
    kept_TK, outside_T = student.at(indices_TK) / temperature, student.log_rest(indices_TK, temperature)
    tail_T = wide(tail_logmass_T).clamp(LOG_NOTHING, math.log(TAIL_LIMIT))
    teacher_TC = torch.cat([tempered(logprobs_TK, tail_T, temperature), tail_T.unsqueeze(-1)], -1)
    return teacher_TC, torch.log_softmax(torch.cat([kept_TK, outside_T.unsqueeze(-1)], -1), -1)


def head_pair(
    student: LogitView, indices_TK: Tensor, logprobs_TK: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student at `temperature` given that the token is one of the k kept, [T, K] each.

    For a teacher whose tail is unknown. Exact at every temperature, but blind to the student's mass outside K.
    """
    kept_TK = student.at(indices_TK) / temperature
    return torch.log_softmax(wide(logprobs_TK) / temperature, -1), torch.log_softmax(kept_TK, -1)


def dense_pair(
    teacher_TV: Tensor, student_TV: Tensor, temperature: float = 1.0, vocab: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student at `temperature` over the whole vocabulary, from logits.

    Columns beyond `vocab` are padding and are dropped; without `vocab` both are cut to the narrower of the two.

    Returns:
        (teacher, student), each [T, V], float32 or the wider dtype of what was given.
    """
    width = vocab or min(teacher_TV.shape[-1], student_TV.shape[-1])
    teacher_TV, student_TV = (wide(logits_TV[:, :width]) / temperature for logits_TV in (teacher_TV, student_TV))
    return torch.log_softmax(teacher_TV, -1), torch.log_softmax(student_TV, -1)


def forward_kl(teacher_TC: Tensor, student_TC: Tensor) -> Tensor:
    """KL(teacher || student) in nats per token from log-probabilities over the same outcomes, [T], at least 0."""
    return _not_negative((teacher_TC.exp() * (teacher_TC - student_TC)).sum(-1))


def cached_kl(
    student: LogitView,
    indices_TK: Tensor,
    logprobs_TK: Tensor,
    tail_logmass_T: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """KL(teacher || student) in nats per token over the k kept ids and one tail bucket; arguments as `coarse_pair`.

    Gradient with respect to student logits, times T: q_j - p_j on K, and q_j (1 - t / q_tail) off K.

    Returns:
        [T] float32, at least 0.
    """
    return forward_kl(*coarse_pair(student, indices_TK, logprobs_TK, tail_logmass_T, temperature))


def _not_negative(kl_T: Tensor) -> Tensor:
    """Round-off below zero becomes zero in the value; the gradient stays."""
    return kl_T + (kl_T.clamp_min(0) - kl_T).detach()


def kl_dense(teacher_TV: Tensor, student_TV: Tensor, temperature: float = 1.0, vocab: int | None = None) -> Tensor:
    """KL(teacher || student) in nats per token over the whole vocabulary, [T] float32 (or float64).

    Works through CHUNK_TOKENS tokens at a time, so that without gradients only a chunk of each
    distribution is ever held in float32. The vocabulary is cut as in `dense_pair`.
    """
    chunks = zip(torch.split(teacher_TV, CHUNK_TOKENS), torch.split(student_TV, CHUNK_TOKENS), strict=True)
    return torch.cat([forward_kl(*dense_pair(*chunk, temperature, vocab)) for chunk in chunks])


def predicts_label(labels_BS: Tensor) -> Tensor:
    """Positions whose next token is a label, bool [B, S]: position j predicts token j + 1, a row's last one nothing."""
    chosen_BS = torch.zeros_like(labels_BS, dtype=torch.bool)
    chosen_BS[:, :-1] = labels_BS[:, 1:] != IGNORED_LABEL
    return chosen_BS


def cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """-log q(label) in nats per token, [T] float32; 0 where the label is IGNORED_LABEL."""
    return functional.cross_entropy(logits_TV.float(), labels_T, reduction="none", ignore_index=IGNORED_LABEL)
