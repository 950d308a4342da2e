"""Hearing a model while it runs: the outputs of layers, and what routers and experts of MoE layers are given and say.

Gradients are kept, so that losses can be made of what is heard; whoever wants none runs the model without them. Padding
experts (padding.py) are not heard: experts count the real ones of their layer.

Shape suffixes: B rows, S tokens of a row, T = B x S tokens, D model, E experts, K top-k.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_edge.families.taps import body, decoder_layers
from moe_edge.families.views import moe_layers


@dataclass
class Sounds:
    """What the last forward pass left, by decoder layer."""

    layers: dict[int, Tensor] = field(default_factory=dict)  # the layer's output [B, S, D]
    router_logits: dict[int, Tensor] = field(default_factory=dict)  # [T, E], before softmax or sigmoid; no padding
    expert_inputs: dict[int, Tensor] = field(default_factory=dict)  # [T, D]
    routing: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (index_TK, weight_TK) as handed over


@contextmanager
def listening(model: nn.Module, layers: Iterable[int] = (), routers: Iterable[int] = ()) -> Iterator[Sounds]:
    """While open, every forward pass of `model` leaves its sounds in the object that is yielded.

    Args:
        layers: decoder layers whose output is wanted.
        routers: decoder layers whose router logits, routing and expert inputs are wanted.

    Raises:
        KeyError: a layer of `routers` has no experts.
    """
    heard, routers = Sounds(), list(routers)
    with ExitStack() as stack:
        for layer in layers:
            hook = decoder_layers(model)[layer].register_forward_hook(_output(heard.layers, layer))
            stack.callback(hook.remove)
        views = {view.index: view for view in moe_layers(model)} if routers else {}
        for layer in routers:
            view = views[layer]
            real_E = torch.tensor(view.real) if len(view.real) < view.count else None
            hook = view.router.register_forward_hook(_output(heard.router_logits, layer, real_E))
            stack.callback(hook.remove)
            before = view.experts.register_forward_pre_hook(_inputs(heard, layer, real_E))
            stack.callback(before.remove)
        yield heard


def _output(into: dict[int, Tensor], layer: int, real_E: Tensor | None = None) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        into[layer] = found if real_E is None else found[:, real_E.to(found.device)]

    return hook


def _inputs(heard: Sounds, layer: int, real_E: Tensor | None) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        hidden_TD, index_TK, weight_TK, *_ = inputs
        if real_E is not None:  # their places among the real experts; no other is ever chosen
            index_TK = torch.searchsorted(real_E.to(index_TK.device), index_TK)
        heard.expert_inputs[layer], heard.routing[layer] = hidden_TD, (index_TK, weight_TK)

    return hook


def hidden_states(wrapped: nn.Module, model: nn.Module, ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """The head's input [B, S, D], from a forward pass of the whole model that makes logits of one position only.

    The pass goes through `wrapped` (the model, or what a parallel backend wrapped around it), because backends gather
    weights and gradients only then.
    """
    heard: dict[int, Tensor] = {}

    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        heard[0] = output.last_hidden_state

    handle = body(model).register_forward_hook(hook)
    try:
        wrapped(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return heard[0]
