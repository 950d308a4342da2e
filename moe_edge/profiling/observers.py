"""What listens while the teacher reads: the experts' own work, the dense matrix products' inputs, the layers' outputs.

The experts' forward is replaced by one that computes the same result expert by expert and takes the sums on the
way, so that statistics cost a few passes over activations and no expert runs twice. On the few tokens of a CKA
block every expert runs (evidence.py). Routing is what the experts module receives (hidden, index, weight), never
recomputed.

Shape suffixes: T tokens of a batch, S slots (token, k) of it, K top-k, E experts, n tokens of an expert, D model width.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_edge.formulas.cka import gram, normalise_rows, sink_mask
from moe_edge.models.streaming import replaced_forward
from moe_edge.models.taps import Tap
from moe_edge.models.views import MoELayerView, down_project, expert_activations, router_scores
from moe_edge.models.weights import read_expert
from moe_edge.profiling.evidence import Block, Evidence
from moe_edge.profiling.sums import IMATRIX, Sums


@dataclass
class Batch:
    """The CKA blocks of the rows that are being read; empty for most batches."""

    blocks: list[Block] = field(default_factory=list)


@contextmanager
def observing(view: MoELayerView | None, taps: Sequence[Tap], sums: Sums, batch: Batch) -> Iterator[None]:
    """Listen to one decoder layer while the context is open; the model's results stay the same.

    Args:
        view: its experts; None for a dense layer.
        taps: of this layer.
    """
    with ExitStack() as stack:
        if view is not None:
            observer = ExpertsObserver(view, sums, batch)
            stack.enter_context(replaced_forward(view.experts, observer.forward))
            for handle in (
                view.layer.register_forward_pre_hook(observer.on_layer_input, with_kwargs=True),
                view.layer.register_forward_hook(observer.on_layer_output),
            ):
                stack.callback(handle.remove)
        for tap in taps:
            adder = SquareAdder(sums[IMATRIX + tap.name])
            stack.callback(tap.module.register_forward_pre_hook(adder).remove)
        yield


def add_weight_sizes(view: MoELayerView, sums: Sums) -> None:
    """Mean |w| and root mean square of every expert's gate, up and down matrices; once per pass, not once per batch."""
    for expert in range(view.count):
        weights = read_expert(view, expert)
        matrices = [matrix.float() for matrix in (weights.gate_FD, weights.up_FD, weights.down_DF)]
        count = sum(matrix.numel() for matrix in matrices)
        sums["weight_mean_abs"][expert] = sum(matrix.abs().sum().double() for matrix in matrices) / count
        sums["weight_rms"][expert] = (sum(matrix.square().sum().double() for matrix in matrices) / count) ** 0.5


@dataclass
class SquareAdder:
    """Adds the squares of a module's input columns to a row of the sums."""

    total_D: Tensor

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.total_D += column_squares(inputs[0].flatten(0, -2))


def column_squares(values_TD: Tensor) -> Tensor:
    """Sum over tokens of the squares, per column."""
    return values_TD.float().square().sum(dim=0)


class ExpertsObserver:
    """Runs the experts of one layer and adds up what they do."""

    def __init__(self, view: MoELayerView, sums: Sums, batch: Batch) -> None:
        self.view, self.sums, self.batch = view, sums, batch

    def on_layer_input(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Find the tokens whose residual is a sink before the layer adds to it."""
        hidden = inputs[0] if inputs else keywords["hidden_states"]
        for block in self.batch.blocks:
            block.residual_sink_N = sink_mask(hidden.flatten(0, -2)[block.token_N], block.position_N)

    def on_layer_output(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep each block's Gram matrix of the residual stream, for the similarity of layers."""
        hidden = output[0] if isinstance(output, tuple) else output
        for block in self.batch.blocks:
            features_ND = hidden.flatten(0, -2)[block.token_N]
            block.sinks.append(sink_mask(features_ND, block.position_N))
            block.grams.append(gram(normalise_rows(features_ND)))

    def forward(self, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The experts' result, as transformers computes it: sum over k of weight times expert output."""
        tokens, top_k = index_TK.shape
        count_E = torch.bincount(index_TK.flatten(), minlength=self.view.count)
        order_S = torch.argsort(index_TK.flatten(), stable=True)  # grouped by expert
        evidence = [Evidence(self.view, block, hidden_TD, index_TK, weight_TK) for block in self.batch.blocks]
        gate_S = weight_TK.flatten()
        result_TD = torch.zeros(hidden_TD.shape, device=hidden_TD.device)
        for expert, slot_n in enumerate(torch.split(order_S, count_E.tolist())):
            token_n, gate_n = slot_n // top_k, gate_S[slot_n]
            out_nD = self._run_expert(expert, hidden_TD, token_n, evidence).float()
            self._add_outputs(expert, out_nD, gate_n.double())
            result_TD.index_add_(0, token_n, out_nD * gate_n.float().unsqueeze(-1))
        self._add_routing(hidden_TD, index_TK, weight_TK, count_E)
        score_TE = router_scores(self.view, hidden_TD)
        self.sums["entropy"] += entropy(score_TE).sum()
        for block in evidence:
            block.add_to(self.sums, score_TE[block.token_n])
        return result_TD.to(hidden_TD.dtype)

    def _run_expert(self, expert: int, hidden_TD: Tensor, token_n: Tensor, evidence: Sequence[Evidence]) -> Tensor:
        """Raw outputs on the routed tokens; the other tokens of CKA blocks run along in the same products."""
        n = len(token_n)
        token_m = torch.cat([token_n, *(block.not_routed_to(expert) for block in evidence)]) if evidence else token_n
        active_mF = expert_activations(self.view, hidden_TD[token_m], expert)
        out_mD = down_project(self.view, active_mF, expert)
        self.sums[IMATRIX + "expert_down"][expert] += column_squares(active_mF[:n])
        if evidence:
            row_T = token_m.new_empty(len(hidden_TD))
            row_T[token_m] = torch.arange(len(token_m), device=token_m.device)
            for block in evidence:
                block.see(expert, out_mD[row_T[block.token_n]])
        return out_mD[:n]

    def _add_outputs(self, expert: int, out_nD: Tensor, gate_n: Tensor) -> None:
        """Outputs, their squares and norms, and the gates of the tokens routed to one expert."""
        square_nD = out_nD.square()
        norm_sq_n = square_nD.sum(dim=1).double()
        norm_n = norm_sq_n.sqrt()
        self.sums["out_sum"][expert] += out_nD.sum(dim=0)
        self.sums["out_sq_sum"][expert] += square_nD.sum(dim=0)
        self.sums["gate_sum"][expert] += gate_n.sum()
        self.sums["norm_sum"][expert] += norm_n.sum()
        self.sums["norm_sq_sum"][expert] += norm_sq_n.sum()
        self.sums["gated_norm_sum"][expert] += gate_n @ norm_n
        if len(norm_n):
            self.sums["norm_max"][expert].clamp_(min=norm_n.max())

    def _add_routing(self, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, count_E: Tensor) -> None:
        """Counts, gates, and the squares of the block's input: of all tokens, and of those routed to each expert."""
        routed_TE = torch.zeros(len(index_TK), self.view.count, device=hidden_TD.device).scatter_(1, index_TK, 1.0)
        square_TD = hidden_TD.float().square()
        self.sums["counts"] += count_E
        self.sums["coroute"] += (routed_TE.T @ routed_TE).round().long()
        self.sums["gate_mass"] += weight_TK.double().sum()
        self.sums[IMATRIX + "ffn_in"] += square_TD.sum(dim=0)
        self.sums[IMATRIX + "expert_in"] += routed_TE.T @ square_TD


def entropy(score_TE: Tensor) -> Tensor:
    """Nats per token, of the scores as shares of their sum."""
    share_TE = score_TE / score_TE.sum(dim=1, keepdim=True)
    return -torch.xlogy(share_TE, share_TE).sum(dim=1)
