"""Faster experts kernels for a CPU, registered with `transformers` under the names below; the results are the same.

`sorted_loop` sorts the routed slots by expert once and runs one dense product per expert. The stock loop indexes the
stacked weights, whose backward pass fills a full-size gradient for every single expert; `unbind` hands all gradients
back in one piece.

`all_at_once` runs every expert on every token in two large products and weighs the unrouted ones by zero. It wastes a
factor E/K of arithmetic and saves gathering and scattering K copies of the hidden states, which on a CPU costs more
than the arithmetic as long as K/E is large: a pruned student routes to most of what is left.

`fastest_kernel` chooses. Both serve training and evaluation; no file that is written depends on them.

Shape suffixes: T tokens, K chosen experts per token, S = T x K slots, D model, E experts, F expert width, G = 2F, X = E x G.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SORTED_LOOP = "sorted_loop"
ALL_AT_ONCE = "all_at_once"
DENSE_SHARE = 0.5  # K/E from which wasted products cost less than moved tokens: tests/benchmarks/bench_kernels.py


def fastest_kernel(top_k: int, experts: int) -> str:
    """The name to give to `model.set_experts_implementation` on a CPU."""
    return ALL_AT_ONCE if top_k >= DENSE_SHARE * experts else SORTED_LOOP


def sorted_loop_experts(self: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts' weighted sum for each token; same contract as `Qwen3MoeExperts.forward`."""
    top_k = index_TK.shape[1]
    slot_expert_S = index_TK.flatten()
    order_S = torch.argsort(slot_expert_S, stable=True)
    token_of_slot_S = order_S // top_k
    counts = torch.bincount(slot_expert_S, minlength=self.num_experts).tolist()
    pieces = hidden_TD.index_select(0, token_of_slot_S).split(counts)
    gate_up_E, down_E = unbound_experts(self, "gate_up_proj"), unbound_experts(self, "down_proj")
    outputs = []
    for piece, gate_up, down in zip(pieces, gate_up_E, down_E, strict=True):
        outputs.append(functional.linear(self._apply_gate(functional.linear(piece, *gate_up)), *down))
    slot_weight_S = weight_TK.flatten().index_select(0, order_S)
    weighted_SD = torch.cat(outputs) * slot_weight_S.unsqueeze(-1)
    added_SD = weighted_SD.to(hidden_TD.dtype)  # some routers hand out float32 weights in a bfloat16 model
    return torch.zeros_like(hidden_TD).index_add(0, token_of_slot_S, added_SD)


def all_at_once_experts(self: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts' weighted sum for each token, computed for all experts; same contract as above."""
    tokens, experts = hidden_TD.shape[0], self.num_experts
    weight_TE = weight_TK.new_zeros(tokens, experts).scatter_add(1, index_TK, weight_TK).to(hidden_TD.dtype)
    (gate_up_EGD, gate_up_bias_EG), (down_EDF, down_bias_ED) = _plain(self, "gate_up_proj"), _plain(self, "down_proj")
    gate_up_TX = functional.linear(hidden_TD, gate_up_EGD.flatten(0, 1), _flat(gate_up_bias_EG))
    active_TEF = self._apply_gate(gate_up_TX.view(tokens, experts, -1)) * weight_TE.unsqueeze(-1)
    out_TD = functional.linear(active_TEF.flatten(1), down_EDF.permute(1, 0, 2).flatten(1))
    return out_TD if down_bias_ED is None else out_TD + weight_TE @ down_bias_ED


def _plain(self: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """A stacked matrix, output rows before input columns, and its bias."""
    weight, bias = getattr(self, name), getattr(self, name + "_bias") if self.has_bias else None
    return (weight.transpose(1, 2) if self.is_transposed else weight), bias


def unbound_experts(self: nn.Module, name: str) -> list[tuple[Tensor, Tensor | None]]:
    """Matrix and bias of every expert."""
    weight, bias = _plain(self, name)
    biases = [None] * len(weight) if bias is None else bias.unbind(0)
    return list(zip(weight.unbind(0), biases, strict=True))


def _flat(bias_EG: Tensor | None) -> Tensor | None:
    return None if bias_EG is None else bias_EG.flatten()


ALL_EXPERTS_FUNCTIONS.register(SORTED_LOOP, sorted_loop_experts)
ALL_EXPERTS_FUNCTIONS.register(ALL_AT_ONCE, all_at_once_experts)
