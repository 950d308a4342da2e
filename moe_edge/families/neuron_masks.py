"""Narrower experts without touching them: some neurons fall silent for a while, as if their columns had been cut.

A neuron's whole contribution is its activation times its column of the down projection, so a zero column is an absent
neuron. The masked copy of a layer's down projections lives only while that layer runs, so that trying a width costs the
memory of one layer; the model's own tensors are never written.

Legend: E experts, F expert width, D model.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from moe_edge.families.views import MoELayerView, moe_layers

NeuronMask = Callable[[MoELayerView], Tensor]  # a layer -> which neurons of its experts stay [E, F] bool


@contextmanager
def silenced(model: nn.Module, mask: NeuronMask) -> Iterator[nn.Module]:
    """While open, only the neurons of `mask` put anything out; the model is as before on exit, also after an error.

    Composes with `pruning.masked`: the mask speaks of the teacher's experts.

    Args:
        mask: asked once per layer and forward pass, while the layer's weights are in memory.
    """
    with ExitStack() as undo:
        for view in moe_layers(model):
            _silence(view, mask, undo)
        yield model


def _silence(view: MoELayerView, mask: NeuronMask, undo: ExitStack) -> None:
    own: list[nn.Parameter] = []

    def before(experts: nn.Module, _inputs: Any) -> None:
        down = experts.down_proj
        mask_EF = mask(view).to(down.device)
        columns = mask_EF.unsqueeze(-1 if getattr(experts, "is_transposed", False) else 1)
        own.append(down)
        experts.down_proj = nn.Parameter(down.detach() * columns, requires_grad=False)

    def after(experts: nn.Module, _inputs: Any, _output: Any) -> None:
        if own:
            experts.down_proj = own.pop()

    undo.callback(view.experts.register_forward_pre_hook(before).remove)
    undo.callback(view.experts.register_forward_hook(after, always_call=True).remove)
