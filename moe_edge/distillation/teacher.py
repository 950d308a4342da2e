"""The teacher in memory, asked at most once per micro-batch for everything that losses, or a capture, want of it.

In training its logits are never held whole: the head's input and the head are handed on, and each chunk of logits is made
where it is judged. Where no loss wants logits, the layers above the deepest one that is wanted are dropped before it ever
runs. A capture reads the logits row by row.

Worth its memory where text changes (on-policy), where a divergence needs the whole vocabulary, or where the teacher is
small; everything else is cheaper from the cache.

Shape suffixes: B rows, S tokens of a row, T tokens, t tokens of a chunk, D model, V vocabulary, C categories.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from moe_edge.distillation.terms import Needs, TeacherActivations
from moe_edge.formulas.divergence import dense_pair, forward_kl
from moe_edge.formulas.logit_views import WholeLogits
from moe_edge.models.students import load_student, use_fastest_experts
from moe_edge.models.taps import body, head, recorded_activations

Routing = Callable[[nn.Module, int], AbstractContextManager[Any]]


@dataclass(frozen=True)
class HiddenSignal:
    """The teacher's whole distribution on some tokens, as what its logits are made of."""

    hidden_TD: Tensor
    head_VD: Tensor  # cut to the true vocabulary

    def __getitem__(self, chosen: slice | Tensor) -> "HiddenSignal":
        return HiddenSignal(self.hidden_TD[chosen], self.head_VD)

    @property
    def ids(self) -> None:
        """As `signal.Signal.ids`: it compares the whole vocabulary."""

    def pair(self, student: WholeLogits, temperature: float) -> tuple[Tensor, Tensor]:
        """As `signal.Signal.pair`; it holds for every temperature."""
        with torch.no_grad():
            teacher_tV = functional.linear(self.hidden_TD.to(self.head_VD.dtype), self.head_VD)
        return dense_pair(teacher_tV, student.logits_TV, temperature)

    def forward_kl(self, student: WholeLogits, temperature: float) -> Tensor:
        """As `signal.Signal.forward_kl`."""
        return forward_kl(*self.pair(student, temperature))


class LiveTeacher:
    """A frozen teacher that answers for micro-batches.

    Args:
        model: the teacher; its parameters are frozen here.
        needs: what losses want beside the logits.
        logits: does anything want its logits? Without, the layers above the deepest one that is needed are deleted from `model`.
        routing: (model, draw) to a context under which it runs, such as knowledge augmentation; None: its own routing.
    """

    def __init__(
        self, model: PreTrainedModel, needs: Needs, logits: bool = True, routing: Routing | None = None
    ) -> None:
        self.model = model
        model.requires_grad_(False)
        model.eval()  # type: ignore[no-untyped-call]
        self.needs, self.has_logits, self._routing = needs, logits, routing
        if not logits and needs and not needs.whole:
            layers = body(model).get_submodule("layers")
            assert isinstance(layers, nn.ModuleList)
            del layers[max(needs.layers | needs.routers) + 1 :]
            gc.collect()
        self._ids_BS: Tensor | None = None  # of the last micro-batch
        self._activations: dict[int, TeacherActivations] = {}  # by draw

    @torch.no_grad()
    def run(self, ids_BS: Tensor, mask_BS: Tensor | None = None, draw: int = 0) -> TeacherActivations:
        """Everything wanted of one micro-batch; asked again for the same one, it answers from memory.

        Args:
            mask_BS: 1 on tokens, 0 on padding at the end of rows; None: no padding.
            draw: which sample of a random routing.
        """
        if self._ids_BS is not ids_BS:
            self._ids_BS, self._activations = ids_BS, {}
        if draw in self._activations:
            return self._activations[draw]
        with ExitStack() as stack:
            if self._routing is not None:
                stack.enter_context(self._routing(self.model, draw))
            activations = stack.enter_context(recorded_activations(self.model, self.needs.layers, self.needs.routers))
            output = body(self.model)(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False)
        hidden_BSD = output.last_hidden_state if self.has_logits else None
        self._activations[draw] = TeacherActivations(
            hidden_BSD, activations.layers, activations.router_logits, activations.expert_inputs
        )
        return self._activations[draw]

    def forget(self) -> None:
        """Its weights have changed: what it gave no longer holds."""
        self._ids_BS, self._activations = None, {}

    def signal(self, activations: TeacherActivations, chosen_BS: Tensor, vocab: int | None) -> HiddenSignal:
        """The distribution at the positions where `chosen_BS` is True, row after row."""
        assert activations.hidden_BSD is not None
        return HiddenSignal(activations.hidden_BSD[chosen_BS], head_weight(self.model, vocab))

    @torch.no_grad()
    def logits(self, ids_BS: Tensor, vocab: int | None = None) -> Iterator[Tensor]:
        """The logits [S, V] of every row, one row held at a time; the rows run together.

        Args:
            vocab: true vocabulary; the head's rows beyond it are padding. None: all are real.
        """
        hidden_BSD = self.run(ids_BS).hidden_BSD
        assert hidden_BSD is not None
        for hidden_SD in hidden_BSD:
            yield head(self.model)(hidden_SD)[:, :vocab]


def own_dtype(device: torch.device) -> torch.dtype:
    """What a teacher computes in unless a dtype is given: float32 on a CPU, bfloat16 on an accelerator."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def teacher_model(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The teacher of a folder on a device, with the fastest experts there.

    Args:
        dtype: of its weights; None: `own_dtype`.

    Raises:
        ConfigError, InputRejected: as `load_student`.
    """
    model = on_device(load_student(path, dtype or own_dtype(device)), device)
    if device.type == "cpu":
        use_fastest_experts(model)
    return model


def reference_teacher(path: Path, device: torch.device) -> PreTrainedModel:
    """The teacher for a measurement: float32, with the experts of transformers; raises as `teacher_model`."""
    return on_device(load_student(path), device)


def on_device(model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model itself, moved, and in another dtype where one is given."""
    return nn.Module.to(model, device=device, dtype=dtype)  # the method of transformers has lost its types


def head_weight(model: nn.Module, vocab: int | None = None) -> Tensor:
    """The head's weight [V, D], cut to the true vocabulary where that is given: the rows beyond it are padding."""
    weight = head(model).weight
    assert isinstance(weight, Tensor)
    return weight[:vocab]
