"""Layers with fewer experts than the largest one: filled up with experts that are never chosen, and freed of them again.

A checkpoint of transformers has one number of experts for all layers. Where a plan keeps fewer in some of them, the free
places are padding: zero matrices, a zero row of the router, and PADDING_BIAS where a bias decides who is chosen before any
weight is normalised. So no token reaches padding and no real expert's weight knows of it: the model computes what it would
without, and any tool that runs the family runs it. Which families have such a bias is data in contracts/capability_table.py.
config.json counts the real experts of every MoE layer (EXPERTS_PER_LAYER); what knows no padding overlooks the key.

Real experts stand at the beginning of each of the router's groups (`spec.places`), because groups are split evenly. Training
leaves padding alone: what no token reaches has no gradient, there is no weight decay, and losses on routers see real experts
only (`taps.recorded_activations`). `check_padding` proves it.

Legend: E experts, P places.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_edge.contracts.capability_table import PADDING
from moe_edge.contracts.errors import InputRejected
from moe_edge.families.base import EXPERTS_PER_LAYER
from moe_edge.models.views import ExpertAxis, MoELayerView, moe_layers

PADDING_BIAS = -10000.0  # float16 and bfloat16 hold it; far below any logit, and any sigmoid with its bias
NEVER_CHOSEN = PADDING_BIAS / 2  # what lies below counts as padding


def is_padded(model: nn.Module) -> bool:
    """Has the model padding experts?"""
    return bool(getattr(model.config, EXPERTS_PER_LAYER, None))


def deciding_bias(view: MoELayerView) -> ExpertAxis:
    """The bias that keeps padding from being chosen; only of a family in PADDING that has one."""
    if PADDING[view.family.model_type] == "router_bias":
        return ExpertAxis(view.router, "bias", 0)
    assert view.selection_bias is not None
    return view.selection_bias


def spread_over(found: ExpertAxis, at: Sequence[int], total: int, fill: float) -> Tensor:
    """The experts of a tensor at the places `at` of `total`, the others filled, as the kind of tensor that it was."""
    old = found.tensor
    shape = list(old.shape)
    shape[found.axis] = total
    new = old.detach().new_full(shape, fill)
    new.index_copy_(found.axis, torch.tensor(at, device=old.device), old.detach())
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def pad_layer(view: MoELayerView, at: Sequence[int], total: int) -> None:
    """Make a layer as large as `total` places, its experts at the places `at`; counts are left to the caller."""
    bias = deciding_bias(view)
    for found in list(view.expert_axes()):
        fill = PADDING_BIAS if (found.owner, found.name) == (bias.owner, bias.name) else 0.0
        setattr(found.owner, found.name, spread_over(found, at, total, fill))


def write_real_counts(config: Any, counts: Sequence[int]) -> None:
    """Say in a model's configuration how many experts of every MoE layer are real."""
    setattr(config, EXPERTS_PER_LAYER, list(counts))


@torch.no_grad()
def check_padding(model: nn.Module) -> None:
    """Is everything that config.json calls padding really never chosen and zero?

    Raises:
        InputRejected: an expert beyond the real ones could be chosen, or holds numbers.
    """
    for view in moe_layers(model):
        padding = sorted(set(range(view.count)) - set(view.real))
        if not padding:
            continue
        chosen = deciding_bias(view).tensor.reshape(-1)[padding].max() > NEVER_CHOSEN
        weights = (found for found in view.expert_axes() if found.owner is view.experts)
        if chosen or any(bool(found.tensor[padding].any()) for found in weights):
            why = f"layer {view.index} has {len(view.real)} experts by {EXPERTS_PER_LAYER}, but others hold numbers"
            raise InputRejected("padding experts are not empty", where="config.json", why=why)
