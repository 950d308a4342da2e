"""One forward pass of a teacher that stops in every MoE layer, so that the layer can be studied and changed there.

All calibration rows go through the body at once; in each layer the visitor sees what the experts were given and what they
answered. It may change the layer's weights, which takes effect from the next forward on, and it may return another
answer: then the layers above see that one, which is the layer-sequential re-forward of REAM (arXiv:2604.05356) without a
second pass. Memory is that of one forward over the rows; nothing is kept between layers.

Shape suffixes: N rows, S tokens of a row, T = N x S, K top-k, D model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_edge.contracts.progress import track
from moe_edge.families.pruning import masked
from moe_edge.families.taps import body
from moe_edge.families.views import MoELayerView, moe_layers, route


@dataclass(frozen=True)
class LayerTokens:
    """What the experts of one layer were handed and what they gave back."""

    hidden_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    output_TD: Tensor  # the routed output, without shared experts


Visitor = Callable[[MoELayerView, LayerTokens], Tensor | None]


@torch.no_grad()
def walk_layers(model: nn.Module, ids_NS: Tensor, visit: Visitor) -> None:
    """Run `model` over the rows and call `visit` in every MoE layer, from the bottom up.

    Args:
        visit: may return a routed output [T, D], which then replaces the layer's own.
    """
    views = moe_layers(model)
    progress = iter(track(views, "compress: layers"))
    with ExitStack() as undo:
        for view in views:
            undo.callback(view.experts.__dict__.pop, "forward", None)
            view.experts.forward = _visiting(view, visit, progress)
        device = next(model.parameters()).device
        body(model)(input_ids=ids_NS.long().to(device), use_cache=False)
        next(progress, None)


def _visiting(
    view: MoELayerView, visit: Visitor, progress: Iterator[object]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    answer = view.experts.forward

    def forward(hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        next(progress, None)
        output_TD = answer(hidden_TD, index_TK, weight_TK)
        view.experts.__dict__.pop("forward", None)  # the visitor may call the experts
        replaced_TD = visit(view, LayerTokens(hidden_TD, index_TK, weight_TK, output_TD))
        return output_TD if replaced_TD is None else replaced_TD.to(output_TD.dtype)

    return forward


@torch.no_grad()
def student_routing(
    model: nn.Module, view: MoELayerView, hidden_TD: Tensor, kept: Sequence[int], top_k: int
) -> tuple[Tensor, Tensor]:
    """How the student will route these tokens in this layer: (index [T, K] of the teacher's experts, weight [T, K])."""
    with masked(model, {view.index: list(kept)}, top_k):
        index_TK, weight_TK = route(view, hidden_TD)
    return torch.tensor(kept, device=index_TK.device)[index_TK], weight_TK
