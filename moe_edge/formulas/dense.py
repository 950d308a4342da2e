"""How much of the routed output each expert stands for: the constants of a dense student.

A dense FFN of several experts side by side (`ffn.concatenate`) has no router, so each expert's share must become a
constant. With the mean gate weight as that constant the FFN has the size of the routed output, and it equals it exactly
where every gate is constant. Which experts enter is the D-optimal criterion's business (arXiv:2605.28207, which found
the scoring to be the biggest lever of a MoE-to-dense conversion).

Shape suffixes: T tokens, K chosen experts per token, E experts.
"""

import torch
from torch import Tensor


def mean_gates(index_TK: Tensor, weight_TK: Tensor, experts: int) -> Tensor:
    """Mean over all tokens of every expert's gate weight, 0 where it is not chosen: [E] float64."""
    total_E = torch.zeros(experts, dtype=torch.float64, device=weight_TK.device)
    return total_E.index_add_(0, index_TK.flatten(), weight_TK.flatten().double()) / max(len(index_TK), 1)
