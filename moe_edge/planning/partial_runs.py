"""Running a model from the middle: masked KL of a change in layer l costs only the layers from l on.

The outputs of all decoder layers under the current choice are kept for a few rows. A trial that changes layer l and
those above starts from the stored output of layer l - 1; the layers below only hand their input on, so that masks,
rotary tables and the head stay the model's own, whatever its family.

Shape suffixes: N rows, S tokens of a row, T tokens of all rows, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_edge.contracts.plan import KeptExperts
from moe_edge.formulas.divergence import kl_dense
from moe_edge.models.pruning import masked
from moe_edge.models.taps import Outputs, decoder_layers, head, recorded_outputs
from moe_edge.models.views import moe_layers


class Meter:
    """Counts the work of a search in tokens that one forward pass of the teacher could have read."""

    def __init__(self, model: PreTrainedModel) -> None:
        views, layers = moe_layers(model), decoder_layers(model)
        routed = sum(parameter.numel() for view in views for parameter in view.experts.parameters())
        idle = routed * (1 - views[0].top_k / views[0].count)
        active = sum(parameter.numel() for parameter in model.parameters()) - idle
        self.layers = len(layers)
        self.head_share = sum(parameter.numel() for parameter in head(model).parameters()) / active
        self.experts_share = routed / active  # of running every expert on every token
        self.spent = 0.0

    def share_from(self, layer: int) -> float:
        """Cost of a run that starts at `layer`, in forward passes."""
        return self.head_share + (1 - self.head_share) * (self.layers - layer) / self.layers

    def add(self, tokens: int, passes: float) -> None:
        self.spent += tokens * passes


@contextmanager
def resumed(layers: Sequence[nn.Module], first: int, outputs: Outputs) -> Iterator[None]:
    """While open, the layers below `first` do nothing, and the last of them returns what is stored for it."""

    def hand_on(hidden: Any = None, *_rest: Any, **keywords: Any) -> Any:
        return keywords["hidden_states"] if hidden is None else hidden

    with ExitStack() as undo:
        for index, layer in enumerate(layers[:first]):
            stored = outputs[index] if index == first - 1 else None
            undo.callback(_restore_forward, layer, layer.__dict__.get("forward"))
            layer.forward = hand_on if stored is None else lambda *_args, _stored=stored, **_keywords: _stored
        yield


def _restore_forward(layer: nn.Module, own: Any) -> None:
    del layer.forward
    if own is not None:
        layer.forward = own


class TrialRows:
    """A few rows on which choices are compared: teacher's logits, and the layers' outputs under the current choice."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, ids_NS: Tensor, top_k: int | None, meter: Meter) -> None:
        self.model, self.ids_NS, self.top_k, self.meter = model, ids_NS.to(model.device), top_k, meter
        self.outputs: Outputs = {}
        meter.add(ids_NS.numel(), 1)
        self._teacher_NSV = self._logits()

    def _logits(self) -> Tensor:
        logits_NSV: Tensor = self.model(input_ids=self.ids_NS, use_cache=False).logits
        return logits_NSV.float()

    @torch.no_grad()
    def run(self, kept: KeptExperts, first: int = 0) -> tuple[Tensor, Outputs]:
        """(KL of each token under `kept` [T] float64 nats, outputs of the layers from `first` on).

        Args:
            first: the lowest decoder layer in which `kept` differs from the current choice.
        """
        layers, outputs = decoder_layers(self.model), Outputs()
        self.meter.add(self.ids_NS.numel(), self.meter.share_from(first))
        with (
            masked(self.model, kept, self.top_k),
            resumed(layers, first, self.outputs),
            recorded_outputs(layers, outputs, first),
        ):
            pairs = zip(self._teacher_NSV, self._logits(), strict=True)
            kl_T = torch.cat([kl_dense(teacher_SV, student_SV) for teacher_SV, student_SV in pairs]).double()
        return kl_T, outputs

    def adopt(self, outputs: Outputs) -> None:
        """Make a run's choice the current one."""
        self.outputs = self.outputs | outputs
