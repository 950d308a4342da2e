"""How far every token is from a near-tie of its router: the score of its last chosen expert minus that of the next one.

Where that gap is smaller than a runtime's rounding error, the runtime may honestly choose another expert, and logits can no
longer be compared number by number.

Legend: T tokens, E experts, K top-k, D model.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from moe_edge.families.views import MoELayerView, moe_layers, route, router_scores


@torch.no_grad()
def routing_gap(view: MoELayerView, hidden_TD: Tensor) -> Tensor:
    """Lowest chosen minus highest other score of each token, (T,); infinite where all experts are chosen.

    In units of what the router sorts by: logits, or scores with the selection bias where the model has one. Of experts
    in groups, only those of a chosen expert's group count as others; a tie between groups is not seen.
    """
    index_TK, _ = route(view, hidden_TD)
    scores_TE = router_scores(view, hidden_TD)
    bias = view.selection_bias
    scores_TE = scores_TE.log() if bias is None else scores_TE + bias.tensor.reshape(-1).float()
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, index_TK, True)
    searched_TGE = chosen_TE.unflatten(1, (view.groups[0], -1))
    searched_TE = searched_TGE.any(-1, keepdim=True).expand_as(searched_TGE).flatten(1)
    others_TE = scores_TE.masked_fill(chosen_TE | ~searched_TE, -torch.inf)
    return scores_TE.masked_fill(~chosen_TE, torch.inf).amin(1) - others_TE.amax(1)


@contextmanager
def watched_gaps(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the block every forward pass appends one gap tensor (T,) per MoE layer to the yielded list."""
    gaps: list[Tensor] = []
    with ExitStack() as undo:
        for view in moe_layers(model):

            def watch(module: nn.Module, inputs: tuple[Tensor, ...], view: MoELayerView = view) -> None:
                hidden = inputs[0]
                gaps.append(routing_gap(view, hidden.reshape(-1, hidden.shape[-1])))

            undo.callback(view.experts.register_forward_pre_hook(watch).remove)
        yield gaps
