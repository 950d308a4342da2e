"""What the sums of squared inputs of a matrix say of its columns: their importance to a quantizer, and the energy of neurons.

`mean_squares` are the weights of a quantizer's errors. An expert that saw few tokens is blended with the mean over all
experts of its layer, because its own mean is noise: (sum_e + a * mean) / (n_e + a), a in tokens. llama.cpp's own imatrix
tool leaves such experts unweighted.

`neurons_to_keep` makes experts narrower. A neuron's whole contribution to the output is (its activation) x (its column of
the down projection), so its energy over the routed tokens is sum(activation^2) x ||column||^2: the first-order part of
HEAPr's output-space saliency for "atomic experts" (arXiv:2509.22299) and the attribution of MoE-Slimming (arXiv:2606.18304),
free after a profile, because the sum of squares is the importance matrix of the down projection. Neurons without energy are
dropped at no cost.

Shape suffixes: E experts (1 for a dense matrix), N input columns, F expert width, D model.
"""

import torch
from torch import Tensor

PRIOR_TOKENS = 64.0  # a: an expert with this many tokens counts half
SMALLEST_SHARE = 1e-6  # of the tensor's mean: a column that no token used still keeps its order of magnitude


def mean_squares(sums_EN: Tensor, counts_E: Tensor) -> Tensor:
    """Blended mean squares [E, N] float32, finite and positive; ones where nothing was seen at all.

    Args:
        sums_EN: float64 sums of squares per expert and column.
        counts_E: float64 tokens per expert.
    """
    total = counts_E.sum()
    if total <= 0 or not sums_EN.isfinite().all() or sums_EN.sum() <= 0:
        return torch.ones_like(sums_EN, dtype=torch.float32)
    mean_1N = sums_EN.sum(dim=0, keepdim=True) / total
    blended_EN = (sums_EN + PRIOR_TOKENS * mean_1N) / (counts_E[:, None] + PRIOR_TOKENS)
    limits = torch.finfo(torch.float32)
    floor = max(SMALLEST_SHARE * float(mean_1N.mean()), limits.tiny)
    return blended_EN.clamp(floor, limits.max).float()


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
