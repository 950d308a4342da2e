"""A gated feed-forward network as a value: what one expert is, whatever its family, and what can be done with its neurons.

down(act(gate x) * up x): a sum over neurons, each with a row of gate, a row of up and a column of down. Neurons can be
reordered or left out, networks can be put side by side; all of it in the weights' own dtype.

A dense network of several experts side by side (`concatenate`) has no router, so each expert's share must become a constant.
With the mean gate weight as that constant (`mean_gates`) it has the size of the routed output, and equals it exactly where
every gate is constant. Which experts enter is the D-optimal criterion's business (arXiv:2605.28207, which found the scoring
to be the biggest lever of a MoE-to-dense conversion).

Shape suffixes: D model, F width, T tokens, K chosen experts per token, E experts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Ffn(NamedTuple):
    """One gated feed-forward network; biases are None where the family has none."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None

    def select(self, neurons: Tensor) -> "Ffn":
        """The network of these neurons, in this order."""
        neurons = neurons.to(self.gate_FD.device)
        gate_bias, up_bias = (None if bias is None else bias[neurons] for bias in (self.gate_bias_F, self.up_bias_F))
        return Ffn(
            self.gate_FD[neurons], self.up_FD[neurons], self.down_DF[:, neurons], gate_bias, up_bias, self.down_bias_D
        )


def concatenate(parts: Sequence[Ffn], scales: Sequence[float]) -> Ffn:
    """One network that computes sum_i scales[i] x parts[i](x), in the parts' dtype."""
    down = [(part.down_DF.double() * scale).to(part.down_DF.dtype) for part, scale in zip(parts, scales, strict=True)]
    dtype = parts[0].down_DF.dtype
    return Ffn(
        torch.cat([part.gate_FD for part in parts]),
        torch.cat([part.up_FD for part in parts]),
        torch.cat(down, dim=1),
        _together([part.gate_bias_F for part in parts], torch.cat),
        _together([part.up_bias_F for part in parts], torch.cat),
        _together([part.down_bias_D for part in parts], lambda biases: _mixed(biases, scales).to(dtype)),
    )


def mean_gates(index_TK: Tensor, weight_TK: Tensor, experts: int) -> Tensor:
    """Mean over all tokens of every expert's gate weight, 0 where it is not chosen: [E] float64."""
    total_E = torch.zeros(experts, dtype=torch.float64, device=weight_TK.device)
    return total_E.index_add_(0, index_TK.flatten(), weight_TK.flatten().double()) / max(len(index_TK), 1)


def weighted_mean(parts: Sequence[Ffn], weights: Sequence[float]) -> Ffn:
    """The mean of networks whose neurons are aligned, in their dtype; equal weights when none is positive."""
    total = sum(weights)
    shares = [weight / total for weight in weights] if total > 0 else [1 / len(parts)] * len(parts)
    dtype = parts[0].gate_FD.dtype
    means = [
        _together(list(tensors), lambda found: _mixed(found, shares).to(dtype)) for tensors in zip(*parts, strict=True)
    ]
    gate_FD, up_FD, down_DF = means[:3]
    assert gate_FD is not None and up_FD is not None and down_DF is not None
    return Ffn(gate_FD, up_FD, down_DF, *means[3:])


def _mixed(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([share * tensor.double() for share, tensor in zip(shares, tensors, strict=True)]).sum(dim=0)


def _together(tensors: Sequence[Tensor | None], join: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
    found = [tensor for tensor in tensors if tensor is not None]
    return join(found) if found else None


def neuron_rows(network: Ffn) -> Tensor:
    """A neuron's weights in one row: its gate row, its up row and its column of down, [F, 3D] float32."""
    return torch.cat([network.gate_FD, network.up_FD, network.down_DF.T], dim=1).float()
