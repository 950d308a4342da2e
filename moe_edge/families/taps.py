"""Where an observer listens in a loaded model: the inputs of the dense matrix products, the decoder layers, the head.

views.py shows the MoE blocks; here is the rest of what a calibration pass needs, so that no other room names a
Hugging Face attribute.

Legend: E experts, T tokens, D model, F expert width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_edge.families.views import MoELayerView, moe_layers


@dataclass(frozen=True)
class Tap:
    """A module whose first argument is the input of the matrix product `name` (a neutral imatrix name) in `layer`."""

    name: str
    layer: int
    module: nn.Module


def body(model: nn.Module) -> nn.Module:
    """The model without its head; its output's `last_hidden_state` is the head's input."""
    return model.model


def head(model: nn.Module) -> nn.Module:
    """The output projection, (T, D) to (T, V)."""
    return model.lm_head


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers in order; the first argument is the residual stream, the output is the residual stream after it."""
    return list(model.model.layers)


def dense_taps(model: nn.Module) -> list[Tap]:
    """attention_in (of q, k and v), attention_o and, with a shared expert, shared_down of every layer."""
    taps = []
    for view, layer in zip(moe_layers(model), decoder_layers(model), strict=True):
        taps.append(Tap("attention_in", view.index, layer.self_attn.q_proj))
        taps.append(Tap("attention_o", view.index, layer.self_attn.o_proj))
        if view.shared is not None:
            taps.append(Tap("shared_down", view.index, view.shared.down_proj))
    return taps


@torch.no_grad()
def down_project(view: MoELayerView, activation_TF: Tensor, expert: int) -> Tensor:
    """The raw output of one expert from `expert_activations`: (T, D)."""
    return activation_TF @ view.experts.down_proj[expert].T
