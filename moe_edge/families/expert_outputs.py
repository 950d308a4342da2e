"""Every expert of a layer on the same tokens, with gradients: what losses between experts are made of.

`views.expert_outputs` serves measurements and makes no gradients; indexing the stacked weights, as it does, would also cost
a full-size gradient per expert in the backward pass. Here the stack is taken apart once.

Legend: E experts, T tokens, D model.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moe_edge.families.kernels import unbound_experts
from moe_edge.families.shared_core import SharedCoreExperts
from moe_edge.families.views import MoELayerView


def differentiable_outputs(view: MoELayerView, hidden_TD: Tensor) -> Tensor:
    """Raw outputs (before the gate weight) of all experts on every token, [E, T, D], in the dtype of the weights."""
    experts = view.experts
    if isinstance(experts, SharedCoreExperts):
        hidden_TD = hidden_TD.to(experts.shared_core.down_proj.dtype)
        return torch.stack([experts.run_expert(hidden_TD, expert) for expert in range(view.count)])
    hidden_TD = hidden_TD.to(experts.down_proj.dtype)
    matrices = zip(unbound_experts(experts, "gate_up_proj"), unbound_experts(experts, "down_proj"), strict=True)
    outputs = []
    for gate_up, down in matrices:
        active_TF = experts._apply_gate(functional.linear(hidden_TD, *gate_up))
        outputs.append(functional.linear(active_TF, *down))
    return torch.stack(outputs)
