"""Counting how a model routes: a light hook on the experts' own input, nothing recomputed.

Shape suffixes: L MoE layers, E experts, K top-k, N rows, S tokens of a row, T tokens.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_edge.contracts.progress import track
from moe_edge.families.taps import body
from moe_edge.families.views import moe_layers


@torch.no_grad()
def routing_counts(model: PreTrainedModel, ids_NS: Tensor) -> tuple[Tensor, Tensor]:
    """(counts_LE int64, gate_sum_LE float64): tokens routed to each expert, and the weights they were mixed in with.

    The expert axis is the model's own; under `families.pruning.masked` it is the teacher's.
    """
    views = moe_layers(model)
    counts_LE = torch.zeros(len(views), views[0].count, dtype=torch.int64)
    gate_sum_LE = torch.zeros(len(views), views[0].count, dtype=torch.float64)
    with ExitStack() as undo:
        for view in views:
            adder = _adder(counts_LE[view.position], gate_sum_LE[view.position])
            undo.callback(view.experts.register_forward_pre_hook(adder).remove)
        for ids_S in track(ids_NS, "routing"):
            body(model)(input_ids=ids_S[None].to(model.device), use_cache=False)
    return counts_LE, gate_sum_LE


def _adder(counts_E: Tensor, gate_sum_E: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        index_X, weight_X = (tensor.flatten().cpu() for tensor in inputs[1:3])  # X = T x K
        counts_E.index_add_(0, index_X, torch.ones_like(index_X))
        gate_sum_E.index_add_(0, index_X, weight_X.double())

    return add
