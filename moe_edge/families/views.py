"""The MoE layers of a loaded model, whatever its family: where the router, the experts and their numbers are.

transformers 5 gives all families one shape: a block with `gate` (router) and `experts` holding `gate_up_proj`
(E, 2F, D), gate rows first, and `down_proj` (E, D, F). A forward pre-hook on `experts` sees (hidden_TD, top_k_index_TK,
top_k_weights_TK): the true routing, never recomputed.

Legend: E experts, K top-k, T tokens, D model, F expert width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_edge.contracts.errors import InputRejected


@dataclass(frozen=True)
class MoELayerView:
    """One MoE layer of a loaded model."""

    index: int  # of the decoder layer
    block: nn.Module
    router: nn.Module  # holds .weight (E, D) and .top_k
    experts: nn.Module  # holds .gate_up_proj (E, 2F, D), .down_proj (E, D, F), .act_fn
    shared: nn.Module | None  # holds gate_proj, up_proj, down_proj

    @property
    def count(self) -> int:
        """E, the experts that are really there."""
        return self.experts.gate_up_proj.shape[0]

    @property
    def top_k(self) -> int:
        return self.router.top_k


def moe_layers(model: nn.Module) -> list[MoELayerView]:
    """The MoE layers of a causal language model in order.

    Raises:
        InputRejected: a layer has no router or experts (a dense model, or a family that is not supported).
    """
    views = []
    for index, layer in enumerate(model.model.layers):
        block = layer.mlp
        if not (hasattr(block, "gate") and hasattr(getattr(block, "experts", None), "gate_up_proj")):
            raise InputRejected(f"layer {index} is not a mixture of experts", why=f"it is a {type(block).__name__}")
        views.append(MoELayerView(index, block, block.gate, block.experts, getattr(block, "shared_expert", None)))
    return views


@torch.no_grad()
def expert_activations(view: MoELayerView, hidden_TD: Tensor, expert: int) -> Tensor:
    """silu(gate(x)) * up(x) of one expert, the input of its down projection: (T, F)."""
    gate_TF, up_TF = functional.linear(hidden_TD, view.experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return view.experts.act_fn(gate_TF) * up_TF


@torch.no_grad()
def expert_outputs(view: MoELayerView, hidden_TD: Tensor, expert_ids: Sequence[int] | None = None) -> Tensor:
    """Raw outputs (before the gate weight) of the given experts on every token: (e, T, D).

    Args:
        expert_ids: which experts, in this order; None = all.
    """
    chosen = range(view.count) if expert_ids is None else expert_ids
    out_eTD = hidden_TD.new_empty(len(chosen), *hidden_TD.shape)
    for row, expert in enumerate(chosen):
        activation_TF = expert_activations(view, hidden_TD, expert)
        torch.mm(activation_TF, view.experts.down_proj[expert].T, out=out_eTD[row])
    return out_eTD
