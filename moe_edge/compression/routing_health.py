"""Routing health of teacher and student on the same few calibration rows, as the compress stage's summary carries it.

Counted on real routing by a light hook on the experts' own input, before and after the experts are dropped; nothing is
recomputed, and nothing is trained in between. What the counts say is in formulas/routing_health.py.

Shape suffixes: L MoE layers, E experts, K top-k, N rows, S tokens of a row, T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_edge.contracts.artifacts import RoutingHealth
from moe_edge.formulas.routing_health import LayerHealth, gate_share_kept, layer_health
from moe_edge.models.taps import body
from moe_edge.models.views import moe_layers
from moe_edge.process.progress import track

_MEANS = ("load_entropy", "variation", "largest_over_fair", "gate_mass")


@dataclass(frozen=True)
class RoutingCounts:
    """What a model did on some rows."""

    counts_LE: Tensor
    gate_sum_LE: Tensor
    tokens: int
    real: list[list[int]] | None = None  # of every layer, the experts that are no padding; None: all

    def health(self) -> list[LayerHealth]:
        """Per layer, over its real experts."""
        real = self.real or [list(range(self.counts_LE.shape[1]))] * len(self.counts_LE)
        rows = zip(self.counts_LE, self.gate_sum_LE, real, strict=True)
        return [
            layer_health(counts_E[own][None], gates_E[own][None], self.tokens)[0] for counts_E, gates_E, own in rows
        ]


def observe(model: PreTrainedModel, ids_NS: Tensor | None) -> RoutingCounts | None:
    """Count the routing of a model; None where there are no rows."""
    if ids_NS is None:
        return None
    return RoutingCounts(*routing_counts(model, ids_NS), ids_NS.numel(), [view.real for view in moe_layers(model)])


@torch.no_grad()
def routing_counts(model: PreTrainedModel, ids_NS: Tensor) -> tuple[Tensor, Tensor]:
    """(counts_LE int64, gate_sum_LE float64): tokens routed to each expert, and the weights they were mixed in with.

    The expert axis is the model's own; under `models.pruning.masked` it is the teacher's.
    """
    views = moe_layers(model)
    counts_LE = torch.zeros(len(views), views[0].count, dtype=torch.int64)
    gate_sum_LE = torch.zeros(len(views), views[0].count, dtype=torch.float64)
    with ExitStack() as undo:
        for view in views:
            adder = _adder(counts_LE[view.position], gate_sum_LE[view.position])
            undo.callback(view.experts.register_forward_pre_hook(adder).remove)
        for ids_S in track(ids_NS, "routing"):
            body(model)(input_ids=ids_S[None].to(model.device), use_cache=False)
    return counts_LE, gate_sum_LE


def _adder(counts_E: Tensor, gate_sum_E: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        index_X, weight_X = (tensor.flatten().cpu() for tensor in inputs[1:3])  # X = T x K
        counts_E.index_add_(0, index_X, torch.ones_like(index_X))
        gate_sum_E.index_add_(0, index_X, weight_X.double())

    return add


def compare(
    teacher: RoutingCounts | None,
    student: RoutingCounts | None,
    kept: Mapping[int, Sequence[int]],
    layers: Sequence[int],
) -> RoutingHealth | None:
    """Before and after; None where a side is missing.

    Args:
        kept: decoder layer -> kept experts; empty = all.
        layers: the decoder layer of every position.
    """
    if teacher is None or student is None:
        return None
    before, after = teacher.health(), student.health()
    teachers, students = _means(before), _means(after)
    if kept:
        share_L = gate_share_kept(teacher.gate_sum_LE, dict(enumerate(kept[layer] for layer in layers)))
        students["teachers_gate_mass_kept"] = float(share_L.nanmean())
    rows = zip(layers, before, after, strict=True)
    alarms = [
        f"layer {layer}: {new.alarm}" + ("" if old.alarm is None else " (so does the teacher)")
        for layer, old, new in rows
        if new.alarm is not None
    ]
    pairs = zip(layers, before, after, strict=True)
    detail = [{"layer": layer, "teacher": asdict(old), "student": asdict(new)} for layer, old, new in pairs]
    return RoutingHealth(tokens=teacher.tokens, teacher=teachers, student=students, layers=detail, alarms=alarms)


def _means(layers: Sequence[LayerHealth]) -> dict[str, float | None]:
    """Means over the layers that were used, and all dead experts together."""
    found: dict[str, float | None] = {}
    for name in _MEANS:
        values = [value for layer in layers if (value := getattr(layer, name)) is not None]
        found[name] = sum(values) / len(values) if values else None
    found["dead_experts"] = sum(len(layer.dead_experts) for layer in layers)
    return found
