"""Which neurons stay at an expert width, for predicting what narrower experts cost before a weight is cut.

The choice is the one that `width.narrow_layer` makes later (formulas/neurons.py), so that masking predicts it exactly,
up to rounding and before any refit.

Shape suffixes: L MoE layers, E experts, F expert width, W width after.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_edge.families.expert_weights import read_expert
from moe_edge.families.views import MoELayerView
from moe_edge.formulas.neurons import neurons_to_keep


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
