"""Watching routers: how far they have moved, and how the student's use its experts, in the log of every step.

A `RouterSnapshot` keeps routers as they were and tells KL(gate now || gate then) on what they are given: a copy of a router is
a few hundred kilobytes and asking it is one small product, so that this is always on. `RoutingTelemetry` is the student's,
with an alarm when a router collapses:

router_entropy: of the gates, 1 = undecided, 0 = certain. router_load_variation: standard deviation of the experts' loads
over their mean. router_dead_experts: share of experts with less than a hundredth of an even load. router_drift_nats: how
far the gates are from those at the start of the stage, on a sample of tokens. All are means over the MoE layers.

Padding tokens are counted like text; training rows have none. Padding experts (models/padding.py) do not count. Several
processes add up what they counted; the drift is that of each one's own sample.

Shape suffixes: L MoE layers, E experts (which layers may have different numbers of), K top-k, T tokens, D model.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import log as ln

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_edge.formulas.routers import gate_logprobs
from moe_edge.formulas.routing_health import layer_health, load_variation
from moe_edge.models.routing import is_sigmoid, router_logits, router_tensors
from moe_edge.models.taps import Activations, recorded_activations
from moe_edge.models.views import moe_layers

log = logging.getLogger(__name__)
DEAD_LOAD = 0.01  # of an even load
DRIFT_TOKENS = 256


class RouterSnapshot:
    """The routers of `model` as they are now; keys are `<decoder layer>.<name below the router>`.

    Raises:
        InputRejected: the model has no routers.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        self._views = moe_layers(model)
        self.parameters = {
            f"{view.index}.{name}": parameter
            for view in self._views
            for name, parameter in router_tensors(view).items()
        }
        self.tensors = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}

    @torch.no_grad()
    def drift(self, inputs: Mapping[int, Tensor]) -> Tensor:
        """Mean KL(now || then) over tokens in nats, of every layer: float32 [L].

        Args:
            inputs: decoder layer -> what its router is given, (T, D).
        """
        kl = []
        for view in self._views:
            then = {name: self.tensors[f"{view.index}.{name}"] for name in router_tensors(view)}
            hidden_TD, sigmoid = inputs[view.index], is_sigmoid(view)
            now = {name: _whole(parameter) for name, parameter in router_tensors(view).items()}
            now_TE = gate_logprobs(router_logits(view, hidden_TD, now)[:, view.real], sigmoid)
            then_TE = gate_logprobs(router_logits(view, hidden_TD, then)[:, view.real], sigmoid)
            kl.append((now_TE.exp() * (now_TE - then_TE)).sum(dim=-1).mean())
        return torch.stack(kl).clamp_min(0)

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the routers of the model what they were."""
        for key, parameter in self.parameters.items():
            parameter.copy_(self.tensors[key])

    @torch.no_grad()
    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Take another snapshot's tensors, as after a resume; the model stays as it is."""
        for key, tensor in self.tensors.items():
            tensor.copy_(tensors[key])


def _whole(parameter: Tensor) -> Tensor:
    """A parameter that FSDP has sharded, from all processes."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


class RoutingTelemetry:
    """An Observer, and Stateful because the start of a stage must survive a resume.

    Raises:
        InputRejected: the student has no routers.
    """

    def __init__(self, student: nn.Module) -> None:
        self._sigmoid = {view.index: is_sigmoid(view) for view in moe_layers(student)}
        self._experts = [len(view.real) for view in moe_layers(student)]
        self._start = RouterSnapshot(student)
        self._alarmed: set[int] = set()
        self._clear()

    def _clear(self) -> None:
        device = next(iter(self._start.tensors.values())).device
        layers = len(self._sigmoid)
        self._counts = [torch.zeros(experts, device=device) for experts in self._experts]  # [E] of each layer
        self._gates = [torch.zeros(experts, device=device) for experts in self._experts]
        self._entropy_L = torch.zeros(layers, device=device)
        self._drift_L: Tensor | None = None
        self._tokens = 0

    @contextmanager
    def recording(self, student: nn.Module) -> Iterator[None]:
        with recorded_activations(student, routers=self._sigmoid) as activations:
            yield
        self._add(activations)

    @torch.no_grad()
    def _add(self, activations: Activations) -> None:
        for place, layer in enumerate(self._sigmoid):
            index_TK, weight_TK = activations.routing[layer]
            logprob_TE = gate_logprobs(activations.router_logits[layer].detach(), self._sigmoid[layer])
            self._entropy_L[place] -= (logprob_TE.exp() * logprob_TE).sum()
            ones_TK = torch.ones_like(weight_TK, dtype=torch.float32)
            self._counts[place].scatter_add_(0, index_TK.flatten(), ones_TK.flatten())
            self._gates[place].scatter_add_(0, index_TK.flatten(), weight_TK.detach().float().flatten())
        self._tokens += len(logprob_TE)
        if self._drift_L is None:
            inputs = {layer: hidden_TD[:DRIFT_TOKENS] for layer, hidden_TD in activations.expert_inputs.items()}
            self._drift_L = self._start.drift(inputs)

    def read(self) -> dict[str, float]:
        if self._drift_L is None:
            return {}
        self._gather()
        counts = [counts_E.cpu() for counts_E in self._counts]
        self._warn(counts)
        most_L = torch.tensor([ln(experts) if experts > 1 else 1.0 for experts in self._experts])
        variations = [float(load_variation(counts_E[None])) for counts_E in counts]
        dead = torch.cat([counts_E < DEAD_LOAD * counts_E.mean() for counts_E in counts])
        numbers = {
            "router_entropy": float((self._entropy_L.cpu() / most_L).mean()) / self._tokens,
            "router_load_variation": sum(variations) / len(variations),
            "router_dead_experts": float(dead.float().mean()),
            "router_drift_nats": float(self._drift_L.mean()),
        }
        self._clear()
        return numbers

    def _gather(self) -> None:
        """The sums over all processes, in each."""
        self._counts = [reduce(counts_E, "sum") for counts_E in self._counts]
        self._gates = [reduce(gates_E, "sum") for gates_E in self._gates]
        self._entropy_L = reduce(self._entropy_L, "sum")
        tokens = torch.tensor(float(self._tokens), dtype=torch.float64)
        self._tokens = int(reduce(tokens.to(self._entropy_L.device), "sum"))

    def _warn(self, counts: Sequence[Tensor]) -> None:
        """One warning per layer when it begins to look collapsed, not one per step."""
        pairs = zip(counts, self._gates, strict=True)
        health = [layer_health(one_E[None], gates_E.cpu()[None], self._tokens)[0] for one_E, gates_E in pairs]
        alarms = {layer: state.alarm for layer, state in zip(self._sigmoid, health, strict=True) if state.alarm}
        for layer in alarms.keys() - self._alarmed:
            log.warning("the router of layer %d looks collapsed: %s", layer, alarms[layer])
        self._alarmed = set(alarms)

    def state(self) -> dict[str, Tensor]:
        """The routers at the start of the stage."""
        return {key: tensor.clone() for key, tensor in self._start.tensors.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._start.replace(state)
