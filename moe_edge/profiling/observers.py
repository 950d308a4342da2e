"""What listens while the teacher reads: the experts' own work, the dense matrix products' inputs, the layers' outputs.

The experts' forward is replaced by one that computes the same result expert by expert and takes the sums on the
way, so that statistics cost a few passes over activations and no expert runs twice. On the few tokens of a CKA
block every expert runs. Routing is what the experts module receives (hidden, index, weight), never recomputed.

Shape suffixes: T tokens of a batch, K top-k, E experts, D model width, N tokens of a block, L layers.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_edge.families.taps import decoder_layers, dense_taps, down_project
from moe_edge.families.views import MoELayerView, expert_activations, moe_layers
from moe_edge.formulas.cka import gate_gram, gram, hsic_from_grams, normalise_rows, sink_mask
from moe_edge.profiling.sums import IMATRIX, Sums


@dataclass
class Block:
    """Tokens of the current batch that run through every expert, and what the layers said about them."""

    token_N: Tensor  # indices into the flattened batch
    position_N: Tensor  # in their row
    residual_sink_N: Tensor | None = None  # of the layer that is running
    any_sink_N: Tensor | None = None  # of any layer so far
    layer_grams: list[Tensor] = field(default_factory=list)  # L of [N, N]


@dataclass
class Batch:
    """The CKA blocks of the rows that are being read; empty for most batches."""

    blocks: list[Block] = field(default_factory=list)


@contextmanager
def observing(model: nn.Module, sums: Sums, batch: Batch) -> Iterator[None]:
    """Listen to every layer of `model` while the context is open; the model's results stay the same."""
    with ExitStack() as stack:
        for view, layer in zip(moe_layers(model), decoder_layers(model), strict=True):
            observer = ExpertsObserver(view, sums, batch)
            stack.callback(view.experts.__dict__.pop, "forward", None)
            view.experts.forward = observer.forward
            for handle in (
                view.router.register_forward_hook(observer.on_router),
                layer.register_forward_pre_hook(observer.on_layer_input, with_kwargs=True),
                layer.register_forward_hook(observer.on_layer_output),
            ):
                stack.callback(handle.remove)
        for tap in dense_taps(model):
            adder = SquareAdder(sums[IMATRIX + tap.name][tap.layer])
            stack.callback(tap.module.register_forward_pre_hook(adder).remove)
        yield


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
        self.view = view
        self.sums = {name: tensor[view.index] for name, tensor in sums.items() if tensor.ndim > 1 or name in _PER_LAYER}
        self.batch = batch
        self.gate_TE = torch.empty(0)

    def on_router(self, module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the softmax over all experts; add its entropy (nats)."""
        logits_TE = output[0].float()
        log_gate_TE = torch.log_softmax(logits_TE, dim=-1)
        self.gate_TE = log_gate_TE.exp()
        self.sums["entropy"] -= (self.gate_TE * log_gate_TE).sum()

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
            sink_N = sink_mask(features_ND, block.position_N)
            block.any_sink_N = sink_N if block.any_sink_N is None else block.any_sink_N | sink_N
            block.layer_grams.append(gram(normalise_rows(features_ND)))

    def forward(self, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The experts' result, as transformers computes it: sum over k of weight times expert output."""
        experts, (tokens, top_k) = self.view.count, index_TK.shape
        order_S = torch.argsort(index_TK.flatten(), stable=True)  # slots (token, k), grouped by expert
        count_E = torch.bincount(index_TK.flatten(), minlength=experts)
        routed_TE = torch.zeros(tokens, experts, device=hidden_TD.device).scatter_(1, index_TK, 1.0)
        cka = [CkaBlock(block, hidden_TD, routed_TE) for block in self.batch.blocks]
        gate_S = weight_TK.flatten()
        weighted_SD = hidden_TD.new_empty(tokens * top_k, hidden_TD.shape[-1])
        for expert, slot_n in enumerate(order_S.split(count_E.tolist())):
            out_nD = self._run_expert(expert, hidden_TD, slot_n // top_k, cka)
            gate_n = gate_S[slot_n]
            self._add_outputs(expert, out_nD.float(), gate_n.double())
            weighted_SD[slot_n] = (out_nD * gate_n.unsqueeze(-1)).to(hidden_TD.dtype)
        self._add_routing(hidden_TD, routed_TE, count_E, weight_TK)
        for block in cka:
            self._add_similarity(block)
        return weighted_SD.view(tokens, top_k, -1).sum(dim=1)

    def _run_expert(self, expert: int, hidden_TD: Tensor, token_n: Tensor, cka: list["CkaBlock"]) -> Tensor:
        """Raw outputs on the routed tokens; the other tokens of CKA blocks run along in the same products."""
        n = len(token_n)
        token_m = torch.cat([token_n, *(block.not_routed_to(expert) for block in cka)]) if cka else token_n
        active_mF = expert_activations(self.view, hidden_TD[token_m], expert)
        out_mD = down_project(self.view, active_mF, expert)
        self.sums[IMATRIX + "expert_down"][expert] += column_squares(active_mF[:n])
        if cka:
            row_T = token_m.new_empty(len(hidden_TD))
            row_T[token_m] = torch.arange(len(token_m), device=token_m.device)
            for block in cka:
                block.gram_ENN[expert] = gram(normalise_rows(out_mD[row_T[block.token_N]]))
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

    def _add_routing(self, hidden_TD: Tensor, routed_TE: Tensor, count_E: Tensor, weight_TK: Tensor) -> None:
        """Counts, and the squares of the block's input: of all tokens, and of those routed to each expert."""
        square_TD = hidden_TD.float().square()
        self.sums["counts"] += count_E
        self.sums["coroute"] += (routed_TE.T @ routed_TE).round().long()
        self.sums["gate_mass"] += weight_TK.double().sum()
        self.sums[IMATRIX + "ffn_in"] += square_TD.sum(dim=0)
        self.sums[IMATRIX + "expert_in"] += routed_TE.T @ square_TD

    def _add_similarity(self, block: "CkaBlock") -> None:
        """HSIC of all pairs of experts, plain and with rows scaled by the softmax gate."""
        self.sums["hsic"] += hsic_from_grams(block.gram_ENN)
        self.sums["gated_hsic"] += hsic_from_grams(gate_gram(block.gram_ENN, self.gate_TE[block.token_N].T))
        self.sums["sinks"] += block.dropped


class CkaBlock:
    """One block in one layer: the tokens left after dropping sinks, and a Gram matrix per expert."""

    def __init__(self, block: Block, hidden_TD: Tensor, routed_TE: Tensor) -> None:
        sink_N = sink_mask(hidden_TD[block.token_N], block.position_N)
        if block.residual_sink_N is not None:
            sink_N = sink_N | block.residual_sink_N
        self.token_N = block.token_N[~sink_N]
        self.dropped = int(sink_N.sum())
        n = len(self.token_N)
        self.gram_ENN = torch.empty(routed_TE.shape[1], n, n, device=hidden_TD.device)
        self._routed_NE = routed_TE[self.token_N] > 0

    def not_routed_to(self, expert: int) -> Tensor:
        """Indices of the block's tokens that the router did not send to `expert`."""
        return self.token_N[~self._routed_NE[:, expert]]


def add_layer_similarity(batch: Batch, sums: Sums) -> None:
    """HSIC between the layers' residual outputs, on the tokens that are a sink in no layer; call it after the
    forward."""
    for block in batch.blocks:
        keep_N = ~block.any_sink_N if block.any_sink_N is not None else slice(None)
        gram_LNN = torch.stack(block.layer_grams)[:, keep_N][:, :, keep_N]
        sums["layer_hsic"] += hsic_from_grams(gram_LNN)
        sums["cka_tokens"] += len(block.token_N)


_PER_LAYER = ("entropy", "gate_mass", "sinks")
