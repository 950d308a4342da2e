"""What a loss beside those on logits looks like to the trainer, and what it may ask of the teacher.

A term records while the student runs (hooks that it sets and removes itself) and then judges one micro-batch. It does not
run a model: the trainer runs the student once, and `LiveTeacher` the teacher at most once per micro-batch, for all
terms together (but for cross_tokenizer.py, whose teacher reads other tokens). Nothing is projected and no term leaves a
parameter in the student.

Shape suffixes: N rows, B rows of a micro-batch, S tokens of a row, T = B x S tokens, D model, E experts.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from moe_edge.contracts.config import StageConfig
from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.contracts.plan import KeptExperts
from moe_edge.distillation.alignment import resolve_layer_map
from moe_edge.models.views import MoELayerView, moe_layers


@dataclass(frozen=True)
class Needs:
    """What a term wants of the teacher in every micro-batch that it judges."""

    layers: frozenset[int] = frozenset()  # outputs of these decoder layers
    routers: frozenset[int] = frozenset()  # router logits, and inputs of the experts, of these decoder layers
    whole: bool = False  # the term runs the teacher itself, so all of its layers must stay

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(self.layers | other.layers, self.routers | other.routers, self.whole or other.whole)

    def __bool__(self) -> bool:
        return bool(self.layers or self.routers)


@dataclass(frozen=True)
class TeacherActivations:
    """The teacher on one micro-batch; only what was asked for is there. No gradients."""

    hidden_BSD: Tensor | None = None  # the head's input
    layers: Mapping[int, Tensor] = field(default_factory=dict)  # decoder layer -> its output [B, S, D]
    router_logits: Mapping[int, Tensor] = field(default_factory=dict)  # decoder layer -> [T, E]
    expert_inputs: Mapping[int, Tensor] = field(default_factory=dict)  # decoder layer -> [T, D]


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch as a term sees it."""

    ids_BS: Tensor
    valid_BS: Tensor  # bool; False on padding
    teacher: TeacherActivations


class RecordsNothing:
    """What a term or an observer inherits that wants nothing of the student's forward pass."""

    def recording(self, student: nn.Module) -> AbstractContextManager[None]:
        """Nothing to record."""
        return nullcontext()


class Term(Protocol):
    """A loss on features, experts or routers.

    `sampled`: judge only the first micro-batch of every optimizer step, an unbiased sample for terms that cost a pass of
    the teacher; else every micro-batch counts by its share of the step's tokens.
    """

    name: str
    sampled: bool
    needs: Needs

    def recording(self, student: nn.Module) -> AbstractContextManager[Any]:
        """While open, a forward pass of the student leaves in the term what `loss` wants of it."""
        ...

    def loss(self, batch: MicroBatch) -> Tensor:
        """The unweighted loss of the micro-batch that was just run: a scalar, at least float32, with gradients."""
        ...


@dataclass(frozen=True)
class TermInputs:
    """What terms may be built from beside the models; a term that needs what is missing says so."""

    kept: KeptExperts | None = None  # the teacher's experts that the student kept
    ids_NS: Tensor | None = None  # a few training rows, on which layer maps and groups of experts are measured
    expert_layer_cka: Tensor | None = None  # [teacher's MoE layers, its experts, student layers], for `expert_share`
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None  # the student's, the teacher's


@dataclass(frozen=True)
class TermContext:
    """Everything a term is built from. Terms are built before `LiveTeacher` drops layers that nobody needs."""

    student: nn.Module
    teacher: nn.Module | None  # the live teacher's model; None where no term asks for it
    stage: StageConfig
    inputs: TermInputs = TermInputs()
    temperature: float = 1.0  # of the stage

    @cached_property
    def layer_map(self) -> dict[int, int]:
        """{student layer: teacher layer}, as the stage asks for it; measured once. Raises as `resolve_layer_map`."""
        assert self.teacher is not None
        return resolve_layer_map(self.stage.layer_map, self.student, self.teacher, self.inputs.ids_NS)


class BatchHook(Protocol):
    """Sees the micro-batches of an optimizer step before they are trained on, and may replace them."""

    def __call__(self, batches: list[dict[str, Tensor]], step: int) -> list[dict[str, Tensor]]: ...


class Stateful(Protocol):
    """Whatever a checkpoint must hold besides the student and its optimizer."""

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: Mapping[str, Tensor]) -> None: ...


class Observer(Protocol):
    """Watches the student without adding to the loss; its numbers go into the log of the step."""

    def recording(self, student: nn.Module) -> AbstractContextManager[Any]: ...

    def read(self) -> dict[str, float]:
        """{log name: value} since the last call."""
        ...


def student_layers(name: str, student: nn.Module) -> list[MoELayerView]:
    """The student's MoE layers.

    Raises:
        ConfigError: it has none, so that the loss `name` means nothing.
    """
    try:
        return moe_layers(student)
    except InputRejected as error:
        raise unfit(name, "a student with routers and experts", "the student is dense") from error


def unfit(name: str, needs: str, why: str) -> ConfigError:
    """The error for a loss that a student cannot have."""
    what = f"the loss '{name}' needs {needs}"
    return ConfigError(what, where="distill.stages: losses", why=why, next_command="set its weight to 0")
