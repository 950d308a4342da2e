"""Which experts a token uses when it may not use its own top-k: all, the best N, or N drawn by the gate; and how much
weight each gets.

Knowledge augmentation of Kim et al. 2025 ("Every Expert Matters", arXiv 2502.12947, section 3.1), as their code does it:
for every token of every layer anew, with probability lambda, N experts are drawn without replacement with the gate's
probabilities, else the top N are taken. The weights are a softmax over the chosen, scaled to the total that the model's
own routing gives to the token: a model that does not renormalise its top-k would otherwise grow its output with N.

Shape suffixes: T tokens, E experts, N experts in use per token, r tokens that sample.
"""

import torch
from torch import Tensor

LEAST_GATE = 1e-30  # an expert whose gate underflows can still be drawn when nothing else is left


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
