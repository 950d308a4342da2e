"""All experts of a layer computed otherwise than by the stock loop of transformers; the results are the same.

Two kernels for a CPU are registered with transformers under the names below:

`sorted_loop` sorts the routed slots by expert once and runs one dense product per expert. The stock loop indexes the
stacked weights, whose backward pass fills a full-size gradient for every single expert; `unbind` hands all gradients
back in one piece.

`all_at_once` runs every expert on every token in two large products and weighs the unrouted ones by zero. It wastes a
factor E/K of arithmetic and saves gathering and scattering K copies of the hidden states, which on a CPU costs more
than the arithmetic as long as K/E is large: a pruned student routes to most of what is left.

`fastest_kernel` chooses. Both serve training and evaluation; no file that is written depends on them.

`differentiable_outputs` gives every expert's output on the same tokens, with gradients: what losses between experts are
made of. `views.expert_outputs` serves measurements and makes none; indexing the stacked weights, as it does, would also
cost a full-size gradient per expert in the backward pass. Weights that are sharded over processes are gathered first,
because no forward pass of the layer does it here.

Shape suffixes: T tokens, K chosen experts per token, S = T x K slots, D model, E experts, F expert width, G = 2F, X = E x G.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_edge.models.shared_core import SharedCoreExperts
from moe_edge.models.views import Experts, MoELayerView

Module = TypeVar("Module", bound=nn.Module)
SORTED_LOOP = "sorted_loop"
ALL_AT_ONCE = "all_at_once"
DENSE_SHARE = 0.5  # K/E from which wasted products cost less than moved tokens: tests/benchmarks/bench_kernels.py


def fastest_kernel(top_k: int, experts: int) -> str:
    """The name to give to `model.set_experts_implementation` on a CPU."""
    return ALL_AT_ONCE if top_k >= DENSE_SHARE * experts else SORTED_LOOP


def sorted_loop_experts(self: Experts, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts' weighted sum for each token; same contract as `Qwen3MoeExperts.forward`."""
    top_k = index_TK.shape[1]
    slot_expert_S = index_TK.flatten()
    order_S = torch.argsort(slot_expert_S, stable=True)
    token_of_slot_S = order_S // top_k
    counts = torch.bincount(slot_expert_S, minlength=self.num_experts).tolist()
    pieces = torch.split(hidden_TD.index_select(0, token_of_slot_S), counts)
    gate_up_E, down_E = _unbound(self, "gate_up_proj"), _unbound(self, "down_proj")
    outputs = []
    for piece, gate_up, down in zip(pieces, gate_up_E, down_E, strict=True):
        outputs.append(functional.linear(self._apply_gate(functional.linear(piece, *gate_up)), *down))
    slot_weight_S = weight_TK.flatten().index_select(0, order_S)
    weighted_SD = torch.cat(outputs) * slot_weight_S.unsqueeze(-1)
    added_SD = weighted_SD.to(hidden_TD.dtype)  # some routers hand out float32 weights in a bfloat16 model
    return torch.zeros_like(hidden_TD).index_add(0, token_of_slot_S, added_SD)


def all_at_once_experts(self: Experts, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts' weighted sum for each token, computed for all experts; same contract as above."""
    tokens, experts = hidden_TD.shape[0], self.num_experts
    weight_TE = weight_TK.new_zeros(tokens, experts).scatter_add(1, index_TK, weight_TK).to(hidden_TD.dtype)
    (gate_up_EGD, gate_up_bias_EG), (down_EDF, down_bias_ED) = _plain(self, "gate_up_proj"), _plain(self, "down_proj")
    gate_up_TX = functional.linear(hidden_TD, gate_up_EGD.flatten(0, 1), _flat(gate_up_bias_EG))
    active_TEF = self._apply_gate(gate_up_TX.view(tokens, experts, -1)) * weight_TE.unsqueeze(-1)
    out_TD = functional.linear(active_TEF.flatten(1), down_EDF.permute(1, 0, 2).flatten(1))
    return out_TD if down_bias_ED is None else out_TD + weight_TE @ down_bias_ED


ALL_EXPERTS_FUNCTIONS.register(SORTED_LOOP, sorted_loop_experts)
ALL_EXPERTS_FUNCTIONS.register(ALL_AT_ONCE, all_at_once_experts)


def differentiable_outputs(view: MoELayerView, hidden_TD: Tensor) -> Tensor:
    """Raw outputs (before the gate weight) of all experts on every token, [E, T, D], in the dtype of the weights."""
    experts = view.experts
    if any(isinstance(parameter, DTensor) for parameter in experts.parameters()):
        experts = _gathered(experts)
    hidden_TD = hidden_TD.to(next(iter(experts.parameters())).dtype)
    if isinstance(experts, SharedCoreExperts):
        return torch.stack([experts.run_expert(hidden_TD, expert) for expert in range(view.count)])
    matrices = zip(_unbound(experts, "gate_up_proj"), _unbound(experts, "down_proj"), strict=True)
    outputs = []
    for gate_up, down in matrices:
        active_TF = experts._apply_gate(functional.linear(hidden_TD, *gate_up))
        outputs.append(functional.linear(active_TF, *down))
    return torch.stack(outputs)


def _gathered(module: Module) -> Module:
    """A copy whose parameters are whole on every process; gradients go back to the shards, averaged over processes as those
    of the forward pass are."""
    gathered = copy.copy(module)
    gathered._modules = {name: _gathered(child) for name, child in module.named_children()}
    gathered._parameters = {
        name: parameter.full_tensor(grad_placements=[Partial("avg")]) if isinstance(parameter, DTensor) else parameter
        for name, parameter in module._parameters.items()
    }
    return gathered


def _unbound(experts: Experts, name: str) -> list[tuple[Tensor, Tensor | None]]:
    """Matrix and bias of every expert."""
    weight, bias = _plain(experts, name)
    biases = [None] * len(weight) if bias is None else bias.unbind(0)
    return list(zip(weight.unbind(0), biases, strict=True))


def _plain(experts: Experts, name: str) -> tuple[Tensor, Tensor | None]:
    """A stacked matrix, output rows before input columns, and its bias."""
    weight, bias = getattr(experts, name), getattr(experts, name + "_bias") if experts.has_bias else None
    return (weight.transpose(1, 2) if experts.is_transposed else weight), bias


def _flat(bias_EG: Tensor | None) -> Tensor | None:
    return None if bias_EG is None else bias_EG.flatten()
