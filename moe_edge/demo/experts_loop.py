"""A faster experts kernel for training on a CPU, registered with `transformers` as `sorted_loop`.

What: sorts the routed slots by expert once, then runs one dense matrix product per expert.
Why: the stock loop indexes the stacked expert weights, whose backward pass fills a full-size
gradient for every single expert; `unbind` hands all gradients back in one piece.
How: `import moe_edge.demo.experts_loop`, then `model.set_experts_implementation("sorted_loop")`.
Only training uses it; the shipped model runs with any implementation.

Shape suffixes: T tokens, K chosen experts per token, S = T x K slots, H hidden, E experts.
"""

import torch
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

KERNEL_NAME = "sorted_loop"


def sorted_loop_experts(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts' weighted sum for each token; same contract as `Qwen3MoeExperts.forward`."""
    num_tokens, top_k = top_k_index.shape
    slot_expert_S = top_k_index.flatten()
    order_S = torch.argsort(slot_expert_S, stable=True)
    token_of_slot_S = order_S // top_k
    counts = torch.bincount(slot_expert_S, minlength=self.num_experts).tolist()
    pieces = hidden_states.index_select(0, token_of_slot_S).split(counts)
    outputs = []
    for piece, gate_up, down in zip(pieces, self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True):
        gate, up = functional.linear(piece, gate_up).chunk(2, dim=-1)
        outputs.append(functional.linear(self.act_fn(gate) * up, down))
    slot_weight_S = top_k_weights.flatten().index_select(0, order_S)
    weighted_SH = torch.cat(outputs) * slot_weight_S.unsqueeze(-1)
    return torch.zeros_like(hidden_states).index_add(0, token_of_slot_S, weighted_SH)


ALL_EXPERTS_FUNCTIONS.register(KERNEL_NAME, sorted_loop_experts)
