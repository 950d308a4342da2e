"""Faster experts kernels for a CPU, registered with `transformers` under the names below; the results are the same.

`sorted_loop` sorts the routed slots by expert once and runs one dense product per expert. The stock loop indexes the
stacked weights, whose backward pass fills a full-size gradient for every single expert; `unbind` hands all gradients
back in one piece.

`all_at_once` runs every expert on every token in two large products and weighs the unrouted ones by zero. It wastes a
factor E/K of arithmetic and saves gathering and scattering K copies of the hidden states, which on a CPU costs more
than the arithmetic as long as K/E is large: a pruned student routes to most of what is left.

`fastest_kernel` chooses. Both serve training and evaluation; no file that is written depends on them.

Shape suffixes: T tokens, K chosen experts per token, S = T x K slots, D model, E experts, F expert width.
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
    outputs = []
    for piece, gate_up, down in zip(pieces, self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True):
        gate, up = functional.linear(piece, gate_up).chunk(2, dim=-1)
        outputs.append(functional.linear(self.act_fn(gate) * up, down))
    slot_weight_S = weight_TK.flatten().index_select(0, order_S)
    weighted_SD = torch.cat(outputs) * slot_weight_S.unsqueeze(-1)
    return torch.zeros_like(hidden_TD).index_add(0, token_of_slot_S, weighted_SD)


def all_at_once_experts(self: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts' weighted sum for each token, computed for all experts; same contract as above."""
    experts, width = self.down_proj.shape[0], self.down_proj.shape[2]
    tokens = hidden_TD.shape[0]
    weight_TE = weight_TK.new_zeros(tokens, experts).scatter_add(1, index_TK, weight_TK)
    gate_up_TEF = functional.linear(hidden_TD, self.gate_up_proj.flatten(0, 1)).view(tokens, experts, 2 * width)
    gate_TEF, up_TEF = gate_up_TEF.chunk(2, dim=-1)
    active_TEF = self.act_fn(gate_TEF) * up_TEF * weight_TE.unsqueeze(-1).to(hidden_TD.dtype)
    down_DX = self.down_proj.permute(1, 0, 2).flatten(1)  # X = E x F
    return functional.linear(active_TEF.flatten(1), down_DX)


ALL_EXPERTS_FUNCTIONS.register(SORTED_LOOP, sorted_loop_experts)
ALL_EXPERTS_FUNCTIONS.register(ALL_AT_ONCE, all_at_once_experts)
