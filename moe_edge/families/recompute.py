"""Activations computed again in the backward pass, for a model that is not in training mode.

transformers recomputes only while a model trains, and a model in training mode may drop out or jitter. A teacher whose
routers alone have gradients wants the memory without that.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_edge.families.streaming import replaced_forward
from moe_edge.families.taps import decoder_layers


@contextmanager
def recomputed(model: nn.Module) -> Iterator[nn.Module]:
    """While open, every decoder layer keeps its input only, and runs again when gradients pass through it.

    The backward pass, too, must come before it closes, and before anything else closes that changes how layers run.
    """
    with ExitStack() as undo:
        for layer in decoder_layers(model):
            undo.enter_context(replaced_forward(layer, partial(checkpoint, layer.forward, use_reentrant=False)))
        yield model
