"""What is learnt on the few tokens that run through every expert: similarity, its null, and what an expert is worth.

A block holds up to 256 tokens of one row. In every layer its sinks are dropped; on the rest, the evidence tokens,
each expert leaves a Gram matrix, and its outputs are added to the layer's result under the true routing and under the
routings without each of the chosen experts. So no more than one expert's outputs are held at a time, and the work is
proportional to the evidence tokens.

Sources: compression.md names them; CKA formulas/cka.py, null formulas/cka_bootstrap.py; leave-one-out as in
ModelOpt's Puzzletron (expert_removal_hooks.py), with the model's own router.

Shape suffixes: N tokens of a block, n evidence tokens of it, E experts, K top-k, D model width, R routings (the true one of
every token, then one for every token and chosen expert).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_edge.formulas.cka import gate_gram, gram, hsic_from_grams, normalise_rows, sink_mask
from moe_edge.formulas.cka_bootstrap import hsic_and_null
from moe_edge.models.routing import can_reroute, route_without
from moe_edge.models.views import MoELayerView
from moe_edge.profiling.sums import Sums


@dataclass
class Block:
    """Tokens of the current batch that run through every expert, and what the layers said about them."""

    token_N: Tensor  # indices into the flattened batch
    position_N: Tensor  # in their row
    number: int = 0  # among all blocks of the pass: the seed of its shuffle
    group: int = 0  # of the bootstrap
    residual_sink_N: Tensor | None = None  # of the layer that is running
    sinks: list[Tensor] = field(default_factory=list)  # L of [N] bool: of the residual stream behind each MoE layer
    grams: list[Tensor] = field(default_factory=list)  # L of [N, N]: of the same


class Evidence:
    """One block in one layer.

    Args:
        hidden_TD, index_TK, weight_TK: what the experts of the layer received for the whole batch.
    """

    def __init__(
        self, view: MoELayerView, block: Block, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> None:
        sink_N = sink_mask(hidden_TD[block.token_N], block.position_N)
        if block.residual_sink_N is not None:
            sink_N = sink_N | block.residual_sink_N
        self.block, self.experts, self.dropped = block, view.count, sink_N.sum()
        self.token_n = block.token_N[~sink_N]
        n = len(self.token_n)
        self.gram_Enn = torch.empty(view.count, n, n, device=hidden_TD.device)
        self.routings = Routings(view, hidden_TD[self.token_n], index_TK[self.token_n], weight_TK[self.token_n])

    def not_routed_to(self, expert: int) -> Tensor:
        """Indices into the batch of the evidence tokens that the router did not send to `expert`."""
        return self.token_n[(self.routings.chosen_nK != expert).all(dim=1)]

    def see(self, expert: int, out_nD: Tensor) -> None:
        """Take what an expert said about the evidence tokens."""
        self.gram_Enn[expert] = gram(normalise_rows(out_nD))
        self.routings.add(expert, out_nD)

    def add_to(self, sums: Sums, gate_nE: Tensor) -> None:
        """HSIC of all pairs of experts, plain, with rows scaled by the gate, and shuffled; what each one is worth."""
        hsic_EE, null_EE = hsic_and_null(self.gram_Enn, self.block.number)
        sums["hsic"] += hsic_EE
        sums["hsic_groups"][self.block.group] += hsic_EE
        sums["null_hsic"] += null_EE
        sums["gated_hsic"] += hsic_from_grams(gate_gram(self.gram_Enn, gate_nE.T))
        sums["sinks"] += self.dropped
        self.routings.add_to(sums)


class Routings:
    """The layer's result for some tokens, as it is and without each of the experts that a token has chosen."""

    def __init__(self, view: MoELayerView, hidden_nD: Tensor, index_nK: Tensor, weight_nK: Tensor) -> None:
        self.chosen_nK, self.experts, n = index_nK, view.count, len(index_nK)
        own_n = torch.arange(n, device=index_nK.device)
        index, weight, token, removed = [index_nK], [weight_nK], [own_n], []
        for expert in range(view.count) if can_reroute(view) else ():
            displaced = (index_nK == expert).any(dim=1).nonzero().flatten()
            if len(displaced):
                other_index, other_weight = route_without(view, hidden_nD[displaced], expert)
                index.append(other_index)
                weight.append(other_weight)
                token.append(displaced)
                removed.append(torch.full_like(displaced, expert))
        self.token_R, self.removed_r = torch.cat(token), torch.cat(removed) if removed else own_n[:0]
        index_RK, self._weight_S = torch.cat(index), torch.cat(weight).float().flatten()
        count_E = torch.bincount(index_RK.flatten(), minlength=view.count)
        self._slots = torch.split(torch.argsort(index_RK.flatten(), stable=True), count_E.tolist())  # per expert
        self._top_k = index_nK.shape[1]
        self.result_RD = torch.zeros(len(index_RK), hidden_nD.shape[1], device=hidden_nD.device)

    def add(self, expert: int, out_nD: Tensor) -> None:
        """Add an expert's outputs to all results that it takes part in."""
        slot = self._slots[expert]
        routing = slot // self._top_k
        self.result_RD.index_add_(0, routing, out_nD.float()[self.token_R[routing]] * self._weight_S[slot, None])

    def add_to(self, sums: Sums) -> None:
        """||y||^2 of all tokens, and ||y - y without e||^2 of those that had chosen e."""
        n = len(self.chosen_nK)
        true_nD = self.result_RD[:n]
        sums["out_energy"] += true_nD.square().sum(dtype=torch.float64)
        error_r = (self.result_RD[n:] - true_nD[self.token_R[n:]]).square().sum(dim=1).double()
        sums["loo_sq_sum"].index_add_(0, self.removed_r, error_r)
        sums["loo_counts"] += torch.bincount(self.removed_r, minlength=self.experts)


def layers_similarity(grams: list[Tensor], sinks: list[Tensor]) -> Tensor:
    """HSIC between the layers' residual outputs of one block, on the tokens that are a sink in none. [L, L] float64."""
    if not grams:
        return torch.zeros(0, 0, dtype=torch.float64)
    keep_N = ~torch.stack(sinks).any(dim=0)
    return hsic_from_grams(torch.stack(grams)[:, keep_N][:, :, keep_N])
