"""Losses on routers: an even load, small logits, and the teacher's gate on the experts that were kept.

A gate is a softmax over the router's logits or, in sigmoid families, the sigmoids over their sum. Both are one softmax:
of the logits, or of their log-sigmoids (`gate_logprobs`). Everything is computed in float32 at least.

Shape suffixes: T tokens (padding already left out), E experts, K top-k, e kept experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def gate_logprobs(logits_TE: Tensor, sigmoid: bool = False) -> Tensor:
    """Log of the gate over all experts, its rows sum to one: log softmax(z), or log(sigmoid(z) / sum of sigmoids)."""
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    return functional.log_softmax(functional.logsigmoid(logits_TE) if sigmoid else logits_TE, dim=-1)


def load_balance(gate_TE: Tensor, index_TK: Tensor) -> Tensor:
    """E sum_i f_i P_i: f the share of tokens routed to an expert (no gradient), P its mean gate; a scalar.

    Fedus et al. 2021 (arXiv 2101.03961, eq. 4-6) in the form of transformers, of one layer: K at an even load, up to E
    where the gate is certain and always the same. The gradient vanishes where every expert is active (f = 1, sum P = 1);
    there `importance_variation` is wanted.
    """
    experts = gate_TE.shape[1]
    counts_E = torch.bincount(index_TK.flatten(), minlength=experts)
    return experts * (counts_E.to(gate_TE.dtype) / len(gate_TE) * gate_TE.mean(dim=0)).sum()


def importance_variation(gate_TE: Tensor) -> Tensor:
    """CV^2 of the experts' importance, the sum of their gates over tokens; a scalar, 0 when even, at most E - 1.

    Shazeer et al. 2017 (arXiv 1701.06538, eq. 6-7), over the whole gate: with every expert active it is exactly theirs,
    with a top-k the form that still has a gradient for the others. Population variance; Kim et al.'s code divides by E - 1.
    """
    importance_E = gate_TE.sum(dim=0)
    mean = importance_E.mean()
    return (importance_E - mean).square().mean() / mean.square()


def router_z(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (Zoph et al. 2022, arXiv 2202.08906, eq. 5); a scalar, at least 0."""
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    return torch.logsumexp(logits_TE, dim=-1).square().mean()


def routing_kl(teacher_TE: Tensor, student_Te: Tensor, kept: Sequence[int], sigmoid: bool = False) -> Tensor:
    """KL(teacher's gate restricted to the kept experts || student's gate) in nats, mean over tokens; a scalar.

    Args:
        teacher_TE, student_Te: router logits; the teacher's are not differentiated.
        kept: the teacher's expert behind each of the student's.
    """
    columns = torch.tensor(list(kept), device=teacher_TE.device)
    teacher_Te = gate_logprobs(teacher_TE.detach().index_select(1, columns), sigmoid)
    student_Te = gate_logprobs(student_Te, sigmoid)
    return (teacher_Te.exp() * (teacher_Te - student_Te)).sum(dim=-1).mean()


def are_probabilities(router_TE: Tensor, sigmoid: bool = False) -> bool:
    """Has what should be raw logits already been through its softmax (rows sum to one) or its sigmoid (all in (0, 1))?

    Some transformers 5 releases returned the softmax under the name of logits; every loss here would then be wrong.
    """
    values_TE = router_TE.detach().float()
    if sigmoid:
        return bool((values_TE > 0).all() and (values_TE < 1).all())
    return bool((values_TE >= 0).all() and (values_TE.sum(dim=-1) - 1).abs().max() < 1e-2)
