"""Random-sampling distillation: a few draws from the teacher in place of its top-k, unbiased for the whole vocabulary.

N ids are drawn with replacement from the teacher's distribution p at one temperature. Their shares t = counts / N have
the mean p, and the gradient of -sum t log q is linear in t, so that its mean over draws is the gradient of the full
KL(p || q), tail included; top-k targets have no such property (RS-KD, arXiv 2503.16870, section 3). The price is
variance, and that only the forward KL can be estimated: any other divergence is not linear in p.

The entropy of p is kept beside the draws, so that the value is unbiased too: E[-sum t log q] - H(p) = KL(p || q).

Shape suffixes: T tokens, V vocabulary, U unique draws per token (rows with fewer are filled up with count 0).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moe_edge.formulas.logit_views import LogitView

CHUNK_TOKENS = 128
MAX_DRAWS = 255  # a count fits one byte


class Draws(NamedTuple):
    """What is kept of a teacher at one temperature."""

    indices_TU: Tensor  # int64, ascending; 0 where the count is 0
    counts_TU: Tensor  # int64, each row sums to the number of draws
    entropy_T: Tensor  # float32 nats


def draw(
    logits_TV: Tensor, draws: int, temperature: float, generator: torch.Generator, vocab: int | None = None
) -> Draws:
    """`draws` ids per token with replacement from softmax(logits / temperature), counted.

    Args:
        logits_TV: raw logits; any float type.
        generator: on the CPU, so that the same seed gives the same draws on every device.
        vocab: true vocabulary; columns beyond it are padding and are dropped. None: all are real.
    """
    ids, counts, entropies = [], [], []
    for logits_tV in torch.split(logits_TV[:, :vocab], CHUNK_TOKENS):
        logprobs_tV = torch.log_softmax(logits_tV.float() / temperature, -1)
        p_tV = logprobs_tV.exp()
        entropies.append(-(p_tV * logprobs_tV.clamp_min(torch.finfo(torch.float32).min)).sum(-1))
        for drawn_N in _inverse_cdf(p_tV, draws, generator):
            found_U, count_U = drawn_N.unique(return_counts=True)
            ids.append(found_U)
            counts.append(count_U)
    return Draws(pad_sequence(ids, True), pad_sequence(counts, True), torch.cat(entropies))


def _inverse_cdf(p_tV: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Ids at uniform heights of the cumulative distribution, [t, N]; float64, since float32 loses the tail's steps."""
    cumulative_tV = p_tV.double().cumsum(-1)
    height_tN = torch.rand(len(p_tV), draws, dtype=torch.float64, generator=generator).to(p_tV.device)
    drawn_tN = torch.searchsorted(cumulative_tV, height_tN * cumulative_tV[:, -1:], right=True)
    last_t1 = (p_tV > 0).long().cumsum(-1).argmax(-1, keepdim=True)  # round-off must not reach an id without mass
    return torch.minimum(drawn_tN, last_t1)


def sampled_kl(
    student: LogitView, indices_TU: Tensor, counts_TU: Tensor, entropy_T: Tensor, temperature: float = 1.0
) -> Tensor:
    """The estimate of KL(teacher || student) in nats per token, [T] float32 (or float64); unbiased, so it may be negative.

    Gradient with respect to student logits, times T: q_j - counts_j / N, whose mean over draws is q_j - p_j.
    """
    log_q_TU = student.at(indices_TU) / temperature - student.log_all(temperature).unsqueeze(-1)
    share_TU = counts_TU.to(log_q_TU.dtype) / counts_TU.sum(-1, keepdim=True)
    return -(share_TU * log_q_TU).sum(-1) - entropy_T
