"""The shared expert of a layer, which every token passes: what scales it, and what its down projection reads.

Legend: T tokens, D model, F width of the shared expert.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moe_edge.families.views import MoELayerView, shared_matrices
from moe_edge.formulas.ffn import Ffn


def shared_network(view: MoELayerView) -> Ffn | None:
    """The expert that every token passes, or None."""
    return None if view.shared is None else Ffn(*shared_matrices(view))


@torch.no_grad()
def shared_gate(view: MoELayerView, hidden_TD: Tensor) -> Tensor:
    """What the shared expert's output is multiplied with, [T, 1]; ones where nothing gates it."""
    gate = getattr(view.block, "shared_expert_gate", None)
    return hidden_TD.new_ones(len(hidden_TD), 1) if gate is None else functional.sigmoid(gate(hidden_TD))


@torch.no_grad()
def shared_activations(view: MoELayerView, hidden_TD: Tensor) -> Tensor:
    """The input of the shared expert's down projection, [T, F], in whatever way its family computes it."""
    names, shared, seen = view.names, view.shared, []
    assert shared is not None
    path = names.shared_down.removesuffix(".weight") if names.shared_gate_up else names.down
    hook = shared.get_submodule(path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        shared(hidden_TD)
    finally:
        hook.remove()
    return seen[0]
