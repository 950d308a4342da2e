"""Losses on logits that are never held whole: head, loss and gradient, one chunk of tokens after the other.

A 512-token row at a vocabulary of 150 k is 311 MB of float32 logits, and autograd would keep several
copies. Here each chunk's logits are made, turned into a loss and into gradients of the hidden states
and of the head at once, and dropped (the scheme of Liger's fused linear losses, arXiv 2410.10989, 3.2).
The numbers are those of the plain computation; only the order of the summation over tokens differs.

Shape suffixes: T tokens, t tokens of a chunk, D model, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_edge.formulas.divergence import CHUNK_TOKENS

# From the logits of a chunk and where it starts: {name: (weight, summed loss)}; unweighted, in nats.
ChunkLoss = Callable[[Tensor, slice], dict[str, tuple[float, Tensor]]]


class _HeadLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass and scales them in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        loss_of: ChunkLoss,
        sums: dict[str, float],
        needs: tuple[bool, bool],
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        weight_VD = weight_VD.detach()
        grad_TD = torch.zeros_like(hidden_TD) if needs[0] else None
        grad_VD = torch.zeros_like(weight_VD) if needs[1] else None
        for start in range(0, hidden_TD.shape[0], CHUNK_TOKENS):
            span = slice(start, min(start + CHUNK_TOKENS, hidden_TD.shape[0]))
            hidden_tD = hidden_TD[span].detach().to(weight_VD.dtype)
            logits_tV = functional.linear(hidden_tD, weight_VD).requires_grad_(any(needs))
            with torch.set_grad_enabled(any(needs)):
                loss = _weighted(loss_of(logits_tV, span), sums)
            total += loss.detach()
            if not any(needs):
                continue
            (slope_tV,) = torch.autograd.grad(loss, logits_tV)
            if grad_TD is not None:
                grad_TD[span] = slope_tV @ weight_VD
            if grad_VD is not None:
                grad_VD.addmm_(slope_tV.T, hidden_tD)
        ctx.gradients = (grad_TD, grad_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g.mul_(slopes[0]) for g in ctx.gradients]
        ctx.gradients = (None, None)
        return (*scaled, None, None, None)


def _weighted(parts: dict[str, tuple[float, Tensor]], sums: dict[str, float]) -> Tensor:
    """The weighted sum of a chunk's losses; adds their unweighted values to `sums`."""
    terms = []
    for name, (weight, value) in parts.items():
        sums[name] = sums.get(name, 0.0) + float(value.detach())
        terms.append(weight * value)
    return torch.stack(terms).sum()


def head_loss(hidden_TD: Tensor, weight_VD: Tensor, loss_of: ChunkLoss) -> tuple[Tensor, dict[str, float]]:
    """Sum over tokens of the weighted losses of `hidden_TD weight_VD'`, differentiable once.

    Args:
        hidden_TD: final hidden states.
        weight_VD: the head, padding rows already cut off; no bias.
        loss_of: losses of one chunk; called with float logits [t, V] and the chunk's token slice.

    Returns:
        the weighted sum (nats), and the unweighted sum of each loss.
    """
    grad_on = torch.is_grad_enabled()
    needs = (grad_on and hidden_TD.requires_grad, grad_on and weight_VD.requires_grad)
    sums: dict[str, float] = {}
    with torch.autocast(hidden_TD.device.type, enabled=False):
        total: Tensor = _HeadLoss.apply(hidden_TD, weight_VD, loss_of, sums, needs)  # type: ignore[no-untyped-call]
    return total, sums
