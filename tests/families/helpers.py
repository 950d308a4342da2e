"""What the tests of the families share: the tiny models' sizes, and looking at one forward pass.

Legend: K top-k, T tokens, D model.
"""

import torch
from torch import Tensor, nn

from moe_edge.models.views import MoELayerView, moe_layers
from tests.tiny import tiny_ids

EXPERTS, LAYERS = 8, 3
KEPT = [0, 2, 3, 4, 6, 7]  # three of each half, which are the groups where there are any
IDS = tiny_ids()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits.float()


def kept_everywhere(model: nn.Module, ids: list[int] = KEPT) -> dict[int, list[int]]:
    return {view.index: ids for view in moe_layers(model)}


def seen_by_experts(model: nn.Module, view: MoELayerView) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden_TD, index_TK, weight_TK, routed output_TD) of one layer during a forward pass."""
    caught: list[Tensor] = []
    handle = view.experts.register_forward_hook(lambda _m, inputs, output: caught.extend([*inputs, output]))
    logits(model)
    handle.remove()
    hidden, index, weight, output = (tensor.detach() for tensor in caught)
    return hidden, index, weight, output
