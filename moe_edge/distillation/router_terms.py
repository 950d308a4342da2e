"""The losses on routers as terms of the trainer: one row each.

load_balance and importance keep the student's experts in use, router_z its logits small, routing_kl makes it choose among
the kept experts as the teacher does. Each is a mean over the student's MoE layers, and over real tokens only. What the
routers say is checked once to be logits: some transformers releases handed out probabilities under that name.

Shape suffixes: B rows, S tokens of a row, T = B x S tokens, E experts, K top-k.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_edge.contracts.errors import ConfigError, EnvironmentProblem
from moe_edge.distillation.terms import MicroBatch, Needs, Term, TermContext, student_layers, unfit
from moe_edge.formulas.routers import (
    are_probabilities,
    gate_logprobs,
    importance_variation,
    load_balance,
    router_z,
    routing_kl,
)
from moe_edge.models.routing import is_sigmoid
from moe_edge.models.taps import Activations, recorded_activations
from moe_edge.models.views import moe_layers

# From the logits (T, E) and ids (T, K) of one layer, real tokens only, and whether its gates are sigmoids.
LayerLoss = Callable[[Tensor, Tensor, bool], Tensor]


class RouterTerm(ABC):
    """The mean over the student's MoE layers of a loss on what its routers say.

    Raises:
        ConfigError: the student has no routers.
    """

    sampled = False
    needs = Needs()

    def __init__(self, name: str, context: TermContext) -> None:
        self.name = name
        self.sigmoid = {view.index: is_sigmoid(view) for view in student_layers(name, context.student)}
        self.activations = Activations()
        self._checked = False

    @contextmanager
    def recording(self, student: nn.Module) -> Iterator[None]:
        with recorded_activations(student, routers=self.sigmoid) as self.activations:
            yield

    def loss(self, batch: MicroBatch) -> Tensor:
        """Raises EnvironmentProblem where the routers hand out probabilities instead of logits."""
        if not self._checked:
            require_logits(self.activations.router_logits, self.sigmoid)
            self._checked = True
        valid_T = batch.valid_BS.flatten()
        return torch.stack([self.layer_loss(layer, batch, valid_T) for layer in self.sigmoid]).mean()

    @abstractmethod
    def layer_loss(self, layer: int, batch: MicroBatch, valid_T: Tensor) -> Tensor:
        """The loss of one decoder layer over the real tokens: a scalar."""


class OwnRouters(RouterTerm):
    """A loss on the student's routing alone."""

    def __init__(self, name: str, context: TermContext, loss: LayerLoss) -> None:
        super().__init__(name, context)
        self._loss = loss

    def layer_loss(self, layer: int, batch: MicroBatch, valid_T: Tensor) -> Tensor:
        index_TK, _ = self.activations.routing[layer]
        logits_TE = self.activations.router_logits[layer]
        return self._loss(logits_TE[valid_T], index_TK[valid_T], self.sigmoid[layer])


class RoutingKl(RouterTerm):
    """KL from the teacher's gate on the kept experts to the student's gate, decoder layer by decoder layer.

    Raises:
        ConfigError: the student has no routers, or its experts are not some of the teacher's.
    """

    def __init__(self, context: TermContext) -> None:
        super().__init__("routing_kl", context)
        self.needs = Needs(routers=frozenset(self.sigmoid))
        self._kept = _kept_experts(context)

    def layer_loss(self, layer: int, batch: MicroBatch, valid_T: Tensor) -> Tensor:
        teacher_TE = batch.teacher.router_logits[layer][valid_T]
        student_TE = self.activations.router_logits[layer][valid_T]
        return routing_kl(teacher_TE, student_TE, self._kept[layer], self.sigmoid[layer])


def _kept_experts(context: TermContext) -> Mapping[int, list[int]]:
    """Decoder layer -> the teacher's expert behind each of the student's; without a plan, all of them in order."""
    kept = {}
    for view in student_layers("routing_kl", context.student):
        count = len(view.real)
        kept[view.index] = list((context.inputs.kept or {}).get(view.index, range(count)))
        if len(kept[view.index]) != count:
            why = f"layer {view.index} has {count} experts, the plan kept {len(kept[view.index])}"
            raise _no_match(why)
    if context.teacher is not None:
        _check_teacher(kept, context.teacher)
    return kept


def _check_teacher(kept: Mapping[int, list[int]], teacher: nn.Module) -> None:
    counts = {view.index: view.count for view in moe_layers(teacher)}
    for layer, experts in kept.items():
        if layer not in counts:
            raise _no_match(f"layer {layer} of the teacher has no experts")
        if max(experts) >= counts[layer]:
            raise _no_match(f"layer {layer} of the teacher has no expert {max(experts)}")


def _no_match(why: str) -> ConfigError:
    return unfit("routing_kl", "a student whose experts are some of the teacher's", why)


def require_logits(router_logits: Mapping[int, Tensor], sigmoid: Mapping[int, bool]) -> None:
    """Raises EnvironmentProblem where what a router handed out has already been through its softmax or sigmoid."""
    for layer, logits_TE in router_logits.items():
        if are_probabilities(logits_TE, sigmoid[layer]):
            why = f"layer {layer}: rows sum to one, or all values lie between 0 and 1"
            what = "the installed transformers hands out router probabilities where logits are expected"
            raise EnvironmentProblem(
                what, where="router_logits", why=why, next_command="pip install transformers==5.23"
            )


def _gate_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> LayerLoss:
    return lambda logits_TE, index_TK, sigmoid: loss(gate_logprobs(logits_TE, sigmoid).exp(), index_TK)


def _row(name: str, loss: LayerLoss) -> Callable[[TermContext], Term]:
    return lambda context: OwnRouters(name, context, loss)


ROUTER_TERMS: dict[str, Callable[[TermContext], Term]] = {
    "load_balance": _row("load_balance", _gate_loss(load_balance)),
    "importance": _row("importance", _gate_loss(lambda gate_TE, _index_TK: importance_variation(gate_TE))),
    "router_z": _row("router_z", lambda logits_TE, _index_TK, _sigmoid: router_z(logits_TE)),
    "routing_kl": RoutingKl,
}
