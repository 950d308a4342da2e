"""Narrower experts: each keeps the neurons that carry most of its output, all of them the same number.

Which neurons stay differs from expert to expert; the model only sees a smaller width. Choosing needs the profile's sums
of squared activations and no forward pass; neurons without energy go at no cost (formulas/importance.py has the sources).
llama.cpp's K-quants want a width that is a multiple of 256, other types a multiple of 32. `narrow_layer` cuts the weights;
`Narrowing` names the same neurons before a weight is cut, so that silencing them in the teacher predicts what narrower
experts cost, up to rounding and before any refit.

Shape suffixes: L MoE layers, E experts, F expert width before, W width after.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_edge.formulas.importance import neurons_to_keep
from moe_edge.models.views import MoELayerView
from moe_edge.models.weights import read_expert, replace_experts


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


@dataclass(frozen=True)
class Narrowing:
    """The neurons of every expert that stay at one width; a layer's are chosen when its weights are first at hand."""

    act_sq_sum_LEF: Tensor  # the profile's imatrix["expert_down"]
    width: int  # W
    _chosen: dict[int, Tensor] = field(default_factory=dict)  # position -> mask [E, F]

    @torch.no_grad()
    def mask(self, view: MoELayerView) -> Tensor:
        """True for the neurons that stay, [E, F]; on the CPU."""
        if view.position not in self._chosen:
            sums_EF = self.act_sq_sum_LEF[view.position]
            mask_EF = torch.zeros(sums_EF.shape, dtype=torch.bool)
            for expert in range(view.count):
                gate_FD, up_FD, down_DF = read_expert(view, expert)[:3]
                neurons_W, _ = neurons_to_keep(sums_EF[expert], gate_FD, up_FD, down_DF, self.width)
                mask_EF[expert, neurons_W.cpu()] = True
            self._chosen[view.position] = mask_EF
        return self._chosen[view.position]
