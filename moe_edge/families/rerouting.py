"""Where the tokens of an expert go when it is taken away: the router asked again without it.

It is the router's own code that answers, so that renormalisation, sigmoids and groups are right for every family. Most
routers lose the expert's row, as in `pruning.masked`. One that splits its rows into equal groups cannot lose a single row;
there the expert is made unselectable through the selection bias.

Shape suffixes: E experts, K top-k, T tokens, D model.
"""

from contextlib import ExitStack

import torch
from torch import Tensor

from moe_edge.families.pruning import mask_router
from moe_edge.families.views import MoELayerView, route


def can_reroute(view: MoELayerView) -> bool:
    """Is there an expert to take the place of a removed one, and a way to ask for it?"""
    return view.count > view.top_k and (view.groups[0] == 1 or view.selection_bias is not None)


@torch.no_grad()
def route_without(view: MoELayerView, hidden_TD: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """(index_TK, weight_TK) that the block would hand to its experts if `expert` were not there; ids as always."""
    bias = view.selection_bias
    if view.groups[0] > 1 and bias is not None:
        row = bias.tensor.select(bias.axis, expert)
        kept = row.clone()
        try:
            row.fill_(-torch.inf)
            return route(view, hidden_TD)
        finally:
            row.copy_(kept)
    with ExitStack() as undo:
        mask_router(view, [other for other in range(view.count) if other != expert], undo)
        index_TK, weight_TK = route(view, hidden_TD)
        return index_TK + (index_TK >= expert), weight_TK
