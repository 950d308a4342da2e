"""Every expert of a layer on the same tokens, with gradients: what losses between experts are made of.

`views.expert_outputs` serves measurements and makes no gradients; indexing the stacked weights, as it does, would also cost
a full-size gradient per expert in the backward pass. Here the stack is taken apart once.

Weights that are sharded over processes are gathered first, because no forward pass of the layer does it here.

Legend: E experts, T tokens, D model.
"""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn import functional

from moe_edge.families.kernels import unbound_experts
from moe_edge.families.shared_core import SharedCoreExperts
from moe_edge.families.views import MoELayerView


def differentiable_outputs(view: MoELayerView, hidden_TD: Tensor) -> Tensor:
    """Raw outputs (before the gate weight) of all experts on every token, [E, T, D], in the dtype of the weights."""
    experts = view.experts
    if any(isinstance(parameter, DTensor) for parameter in experts.parameters()):
        experts = _gathered(experts)
    hidden_TD = hidden_TD.to(next(iter(experts.parameters())).dtype)
    if isinstance(experts, SharedCoreExperts):
        return torch.stack([experts.run_expert(hidden_TD, expert) for expert in range(view.count)])
    matrices = zip(unbound_experts(experts, "gate_up_proj"), unbound_experts(experts, "down_proj"), strict=True)
    outputs = []
    for gate_up, down in matrices:
        active_TF = experts._apply_gate(functional.linear(hidden_TD, *gate_up))
        outputs.append(functional.linear(active_TF, *down))
    return torch.stack(outputs)


def _gathered(module: nn.Module) -> nn.Module:
    """A twin whose parameters are whole on every process; gradients go back to the shards, averaged over processes as those
    of the forward pass are."""
    twin = copy.copy(module)
    twin._modules = {name: _gathered(child) for name, child in module.named_children()}
    twin._parameters = {
        name: parameter.full_tensor(grad_placements=[Partial("avg")]) if isinstance(parameter, DTensor) else parameter
        for name, parameter in module._parameters.items()
    }
    return twin
