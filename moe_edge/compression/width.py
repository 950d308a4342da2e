"""Narrower experts: each keeps the neurons that carry most of its output, all of them the same number.

Which neurons stay differs from expert to expert; the model only sees a smaller width. Choosing needs the profile's sums
of squared activations and no forward pass; neurons without energy go at no cost (formulas/neurons.py has the sources).
llama.cpp's K-quants want a width that is a multiple of 256, other types a multiple of 32.

Shape suffixes: E experts, F expert width before, W width after.
"""

import torch
from torch import Tensor

from moe_edge.families.expert_weights import read_expert, replace_experts
from moe_edge.families.views import MoELayerView
from moe_edge.formulas.neurons import neurons_to_keep


@torch.no_grad()
def narrow_layer(view: MoELayerView, act_sq_sum_EF: Tensor, width: int) -> tuple[Tensor, list[float]]:
    """Cut every expert of a layer to its `width` strongest neurons, in place.

    Args:
        act_sq_sum_EF: sums of squared activations over each expert's routed tokens (imatrix["expert_down"] of the layer).

    Returns:
        (neurons that stay [E, W] ascending, on the CPU; the share of its energy that each expert keeps).
    """
    networks, neurons, shares = [], [], []
    for expert in range(view.count):
        weights = read_expert(view, expert)
        kept, share = neurons_to_keep(act_sq_sum_EF[expert], weights.gate_FD, weights.up_FD, weights.down_DF, width)
        networks.append(weights.select(kept))
        neurons.append(kept.cpu())
        shares.append(share)
    replace_experts(view, networks)
    return torch.stack(neurons), shares
