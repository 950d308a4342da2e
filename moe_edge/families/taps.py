"""Where an observer listens in a loaded model: the inputs of the dense matrix products, the decoder layers, the head.

views.py shows the MoE blocks; here is the rest of what a calibration pass needs, so that no other room names a
Hugging Face attribute.

Legend: T tokens, D model, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from moe_edge.contracts.errors import InputRejected
from moe_edge.families.base import Names
from moe_edge.families.views import MoELayerView, moe_layers

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

    def __init__(self, inner: nn.Module, divisor: float) -> None:
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
        return self.inner(hidden) / self.divisor


def body(model: nn.Module) -> nn.Module:
    """The model without its head; its output's `last_hidden_state` is the head's input."""
    return model.model


def head(model: nn.Module) -> nn.Module:
    """The output projection, (T, D) to (T, V); its `weight` gives the same logits."""
    divisor = float(getattr(model.config, "logits_scaling", None) or 1.0)
    plain = divisor == 1.0 and model.lm_head.bias is None
    return model.lm_head if plain else Head(model.lm_head, divisor)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers in order; the first argument is the residual stream, the output is the residual stream after it."""
    return list(model.model.layers)


def width(model: nn.Module) -> int:
    """D, the width of the residual stream."""
    return model.config.hidden_size


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
