"""Neurons of an expert: which of them matter, for narrower experts.

A neuron's whole contribution to the output is (its activation) x (its column of the down projection), so its energy over
the routed tokens is sum(activation^2) x ||column||^2: the first-order part of HEAPr's output-space saliency for "atomic
experts" (arXiv:2509.22299) and the attribution of MoE-Slimming (arXiv:2606.18304), free after a profile, because the
sum of squares is the importance matrix of the down projection. Neurons without energy are dropped at no cost.

Shape suffixes: E experts, F expert width, D model.
"""

import torch
from torch import Tensor


def neuron_energy(act_sq_sum_F: Tensor, down_DF: Tensor) -> Tensor:
    """sum_t a_f(t)^2 x ||down[:, f]||^2 for each neuron of one expert, [F] float64."""
    return act_sq_sum_F.double() * down_DF.double().square().sum(dim=0)


def weight_energy(gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """||gate_f||^2 ||up_f||^2 ||down_f||^2 [F] float64: what stands in where no token reached an expert.

    For white inputs it is proportional to the neuron's energy up to the curvature of the activation function.
    """
    energy_F = gate_FD.double().square().sum(dim=1) * up_FD.double().square().sum(dim=1)
    return energy_F * down_DF.double().square().sum(dim=0)


def strongest(energy_F: Tensor, width: int) -> Tensor:
    """Indices of the `width` neurons with the most energy, ascending; ties go to the lower index.

    Raises:
        ValueError: width is not in 1..F.
    """
    if not 1 <= width <= len(energy_F):
        raise ValueError(f"cannot keep {width} of {len(energy_F)} neurons")
    order_F = energy_F.argsort(descending=True, stable=True)
    return order_F[:width].sort().values


def kept_energy(energy_F: Tensor, kept: Tensor) -> float:
    """Share of the energy that the kept neurons carry; 1 where there is none at all."""
    total = float(energy_F.sum())
    return float(energy_F[kept].sum()) / total if total > 0 else 1.0


def neurons_to_keep(
    act_sq_sum_F: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, width: int
) -> tuple[Tensor, float]:
    """The neurons of one expert that stay, and the share of its energy that they carry.

    Args:
        act_sq_sum_F: the profile's sums of squared activations over the routed tokens; all zero = no evidence, then the
            weights decide.
    """
    seen = bool((act_sq_sum_F > 0).any())
    energy_F = (
        neuron_energy(act_sq_sum_F.to(down_DF.device), down_DF) if seen else weight_energy(gate_FD, up_FD, down_DF)
    )
    kept = strongest(torch.nan_to_num(energy_F), width)
    return kept, kept_energy(energy_F, kept)
