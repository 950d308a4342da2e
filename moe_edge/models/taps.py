"""The parts of a loaded model between which values are read, and reading them while it runs.

views.py shows the MoE blocks; here is the rest, so that no other room names a Hugging Face attribute: body, decoder layers
and head, and the module in front of which the input of each dense matrix product can be read (`dense_taps`).

`recorded_activations` keeps what layers put out and what routers and experts are given and give, `recorded_outputs` what
layers return. Gradients are kept, so that losses can be made of the values; whoever wants none runs the model without
them. Padding experts (padding.py) are left out: experts count the real ones of their layer.

Shape suffixes: B rows, S tokens of a row, T = B x S tokens, D model, V vocabulary, E experts, K top-k.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_edge.contracts.errors import InputRejected
from moe_edge.families.declared import Names
from moe_edge.models.views import MoELayerView, config_of, moe_layers

# Module below the decoder layer -> neutral imatrix name of its input; one row per distinct input.
_MIXERS = {
    "self_attn.q_proj": "attention_in",
    "self_attn.q_a_proj": "attention_in",
    "self_attn.q_b_proj": "attention_q_b",
    "self_attn.kv_b_proj": "attention_kv_b",
    "self_attn.o_proj": "attention_o",
    "self_attn.out_proj": "attention_o",
    "conv.in_proj": "attention_in",
    "conv.out_proj": "conv_out",
    "linear_attn.in_proj_qkv": "attention_in",
    "linear_attn.out_proj": "linear_out",
}


@dataclass(frozen=True)
class Tap:
    """A module whose first argument is the input of the matrix product `name` (a neutral imatrix name) in `layer`."""

    name: str
    layer: int  # decoder layer
    module: nn.Module


class Head(nn.Module):
    """A head whose logits are divided by a constant, or that has a bias; shares the model's own."""

    def __init__(self, inner: nn.Linear, divisor: float) -> None:
        super().__init__()
        self.inner, self.divisor = inner, divisor

    @property
    def weight(self) -> Tensor:
        """(V, D): hidden @ weight.T are the logits.

        Raises:
            InputRejected: the head has a bias, so that a weight alone would give other logits.
        """
        if self.inner.bias is not None:
            why = "training and its evaluation compute logits from the head's weight alone"
            raise InputRejected("a head with a bias cannot be distilled", where="config.json: lm_head_bias", why=why)
        return self.inner.weight / self.divisor

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.inner(hidden) / self.divisor
        return logits


def body(model: nn.Module) -> nn.Module:
    """The model without its head; its output's `last_hidden_state` is the head's input."""
    return model.get_submodule("model")


def head(model: nn.Module) -> nn.Module:
    """The output projection, (T, D) to (T, V); its `weight` gives the same logits."""
    divisor = float(getattr(config_of(model), "logits_scaling", None) or 1.0)
    projection = model.get_submodule("lm_head")
    assert isinstance(projection, nn.Linear)
    plain = divisor == 1.0 and projection.bias is None
    return projection if plain else Head(projection, divisor)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers in order; the first argument is the residual stream, the output is the residual stream after it."""
    return list(body(model).get_submodule("layers").children())


def width(model: nn.Module) -> int:
    """D, the width of the residual stream."""
    return int(config_of(model).hidden_size)


def dense_taps(model: nn.Module) -> list[Tap]:
    """The inputs of all dense matrix products, layer by layer, of layers without experts, too.

    attention_in (of q, k and v, or of whatever reads the layer's input in their place), attention_o; with latent
    attention attention_q_b and attention_kv_b; conv_out, linear_out; shared_down; dense_in and dense_down.
    """
    views = {view.index: view for view in moe_layers(model)}
    names = next(iter(views.values())).names
    taps = []
    for index, layer in enumerate(decoder_layers(model)):
        found = [*_mixer(layer), *_feed_forward(layer, views.get(index), names)]
        taps += [Tap(name, index, module) for name, module in found]
    return taps


def _mixer(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, name in _MIXERS.items():
        owner, _, leaf = path.rpartition(".")
        module = getattr(getattr(layer, owner, None), leaf, None)
        if module is not None:
            yield name, module


def _feed_forward(layer: nn.Module, view: MoELayerView | None, names: Names) -> Iterator[tuple[str, nn.Module]]:
    if view is None:
        block = layer.get_submodule(names.block)
        yield "dense_in", block.get_submodule(names.gate)
        yield "dense_down", block.get_submodule(names.down)
    elif view.shared is not None:
        yield "shared_down", view.shared.get_submodule(names.shared_down.removesuffix(".weight") or names.down)


Outputs = dict[int, Any]  # decoder layer -> what it returned


@contextmanager
def recorded_outputs(layers: Sequence[nn.Module], outputs: Outputs, first: int = 0) -> Iterator[None]:
    """While open, every forward pass leaves in `outputs` what the layers from `first` on return."""
    with ExitStack() as undo:
        for index in range(first, len(layers)):

            def hook(module: nn.Module, inputs: Any, output: Any, index: int = index) -> None:
                outputs[index] = output

            undo.callback(layers[index].register_forward_hook(hook).remove)
        yield


@dataclass
class Activations:
    """What the last forward pass left, by decoder layer."""

    layers: dict[int, Tensor] = field(default_factory=dict)  # the layer's output [B, S, D]
    router_logits: dict[int, Tensor] = field(default_factory=dict)  # [T, E], before softmax or sigmoid; no padding
    expert_inputs: dict[int, Tensor] = field(default_factory=dict)  # [T, D]
    routing: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (index_TK, weight_TK) as handed over


@contextmanager
def recorded_activations(
    model: nn.Module, layers: Iterable[int] = (), routers: Iterable[int] = ()
) -> Iterator[Activations]:
    """While open, every forward pass of `model` leaves its activations in the object that is yielded.

    Args:
        layers: decoder layers whose output is wanted.
        routers: decoder layers whose router logits, routing and expert inputs are wanted.

    Raises:
        KeyError: a layer of `routers` has no experts.
    """
    found, routers = Activations(), list(routers)
    with ExitStack() as stack:
        for layer in layers:
            hook = decoder_layers(model)[layer].register_forward_hook(_output(found.layers, layer))
            stack.callback(hook.remove)
        views = {view.index: view for view in moe_layers(model)} if routers else {}
        for layer in routers:
            view = views[layer]
            real_E = torch.tensor(view.real) if len(view.real) < view.count else None
            hook = view.router.register_forward_hook(_output(found.router_logits, layer, real_E))
            stack.callback(hook.remove)
            before = view.experts.register_forward_pre_hook(_inputs(found, layer, real_E))
            stack.callback(before.remove)
        yield found


def _output(into: dict[int, Tensor], layer: int, real_E: Tensor | None = None) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        values = output[0] if isinstance(output, tuple) else output
        into[layer] = values if real_E is None else values[:, real_E.to(values.device)]

    return hook


def _inputs(into: Activations, layer: int, real_E: Tensor | None) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        hidden_TD, index_TK, weight_TK, *_ = inputs
        if real_E is not None:  # their places among the real experts; no other is ever chosen
            index_TK = torch.searchsorted(real_E.to(index_TK.device), index_TK)
        into.expert_inputs[layer], into.routing[layer] = hidden_TD, (index_TK, weight_TK)

    return hook


def hidden_states(wrapped: nn.Module, model: nn.Module, ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """The head's input [B, S, D], from a forward pass of the whole model that makes logits of one position only.

    The pass goes through `wrapped` (the model, or what a parallel backend wrapped around it), because backends gather
    weights and gradients only then.
    """
    found: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        found.append(output.last_hidden_state)

    handle = body(model).register_forward_hook(hook)
    try:
        wrapped(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return found[-1]
