"""What is computed on a router's logits: the gate, losses on it, and other choices of experts than the model's own top-k.

A gate is a softmax over the router's logits or, in sigmoid families, the sigmoids over their sum. Both are one softmax:
of the logits, or of their log-sigmoids (`gate_logprobs`). Losses: an even load, small logits, and the teacher's gate on the
experts that were kept. Everything is computed in float32 at least.

Choices: all experts, the best N, or N drawn by the gate (`augmented_experts`), and how much weight each gets. That is the
knowledge augmentation of Kim et al. 2025 ("Every Expert Matters", arXiv 2502.12947, section 3.1), as their code does it:
for every token of every layer anew, with probability lambda, N experts are drawn without replacement with the gate's
probabilities, else the top N are taken. The weights are a softmax over the chosen, scaled to the total that the model's
own routing gives to the token: a model that does not renormalise its top-k would otherwise grow its output with N.

Shape suffixes: T tokens (padding already left out), E experts, K top-k, e kept experts, N experts in use per token, r tokens
that sample.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

LEAST_GATE = 1e-30  # an expert whose gate underflows can still be drawn when nothing else is left


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


def every_expert(gate_TE: Tensor) -> Tensor:
    """Ids of all experts for every token, int64 [T, E]."""
    return torch.arange(gate_TE.shape[1], device=gate_TE.device).expand(*gate_TE.shape)


def augmented_experts(
    gate_TE: Tensor, preference_TE: Tensor, count: int, probability: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ids [T, N] of the experts of every token, and which tokens sampled them (bool, [T]).

    Args:
        gate_TE: the gate, rows sum to one; drawn from.
        preference_TE: what the model's own top-k goes by: the gate, or scores plus a selection bias.
        count: N.
        probability: lambda; 0 always takes the top N, 1 always samples.
        generator: on the device of the gate.
    """
    sampled_T = torch.rand(len(gate_TE), generator=generator, device=gate_TE.device) < probability
    index_TN = preference_TE.topk(count, dim=-1).indices
    gate_rE = gate_TE[sampled_T].clamp_min(LEAST_GATE)
    if len(gate_rE):
        index_TN[sampled_T] = torch.multinomial(gate_rE, count, replacement=False, generator=generator)
    return index_TN, sampled_T


def spread_weights(logprob_TE: Tensor, index_TN: Tensor, total_T: Tensor) -> Tensor:
    """Mixing weights [T, N] of the chosen experts: the gate over them, scaled to `total_T`; differentiable."""
    gate_TN = torch.softmax(logprob_TE.gather(1, index_TN), dim=-1)
    return gate_TN * total_T.unsqueeze(-1)
