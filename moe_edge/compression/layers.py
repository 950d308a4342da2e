"""The layers of a student on their way from teacher to plan: what every action shares.

`work_on_layers` sends all fit rows through the body at once and stops in every MoE layer, from the bottom up
(`walk_layers`). The order in a layer is fixed: the teacher's answer is the target, then the experts are narrowed, then the
action does its work, then the down projections are refitted if the plan says so. Weights change in place, which takes effect
from the next forward on; with `sequential` the layers above see what the student answers, which is the layer-sequential
re-forward of REAM (arXiv:2604.05356) without a second pass. Memory is that of one forward over the rows; nothing is kept
between layers. Router rows and counts are cut when all layers are done (models/pruning.py), because only then one number
holds for the whole model.

Shape suffixes: L MoE layers, E experts, N rows, S tokens of a row, T = N x S, K top-k, D model, F expert width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_edge.compression.refit import LayerFit, refit
from moe_edge.compression.width import narrow_layer
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.plan import Plan
from moe_edge.models.pruning import masked
from moe_edge.models.taps import body
from moe_edge.models.views import MoELayerView, moe_layers, route
from moe_edge.models.weights import check_width, expert_width, write_width
from moe_edge.process.progress import track
from moe_edge.storage.statistics import Statistics


@dataclass(frozen=True)
class Material:
    """What an action may look at besides the teacher."""

    statistics: Statistics | None = None
    ids_NS: Tensor | None = None  # calibration rows [N, S] that may be fitted on (contracts/row_split.py)


@dataclass
class Applied:
    """The student, and what was seen on the way."""

    model: PreTrainedModel
    layers: list[dict[str, Any]] = field(default_factory=list)  # one record per MoE layer, JSON-able
    pairs: list[dict[str, Any]] = field(default_factory=list)  # one record per pair of a merge
    down_energy: dict[int, Tensor] = field(default_factory=dict)  # layer -> mean square of each down column [E', F]


@dataclass(frozen=True)
class LayerTokens:
    """What the experts of one layer were handed and what they gave back."""

    hidden_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    output_TD: Tensor  # the routed output, without shared experts


@dataclass
class StudentLayer:
    """One layer while it is worked on; its weights are narrowed already, no expert has been removed yet."""

    view: MoELayerView
    kept: list[int]
    tokens: LayerTokens  # what the teacher's experts saw and answered
    index_TK: Tensor  # how the student routes the same tokens; the teacher's ids
    weight_TK: Tensor
    fit: LayerFit  # an action may put another one in its place
    record: dict[str, Any]


Visitor = Callable[[MoELayerView, LayerTokens], Tensor | None]
Act = Callable[[StudentLayer], None]


def work_on_layers(
    plan: Plan, material: Material, applied: Applied, act: Act | None = None, collect: Act | None = None
) -> None:
    """Visit every layer of `applied.model`: narrow, act, compensate, collect; weights change in place, no expert goes yet.

    Args:
        act: the action's own work in a layer; collect: what it takes from a finished layer.

    Raises:
        ConfigError: the plan needs calibration rows or statistics that `material` does not have.
        InputRejected: this model's experts cannot be narrowed.
    """
    model = applied.model
    if plan.expert_width is not None:
        _check_narrower(plan.expert_width, expert_width(moe_layers(model)[0]))
        check_width(model, plan.expert_width)
    if plan.fits:
        walk_layers(model, fit_rows(plan, material), _visitor(plan, material, applied, act, collect))
    elif plan.expert_width is not None:
        for view in moe_layers(model):
            record = {"layer": view.index}
            applied.down_energy[view.index] = _narrow(view, plan, material, record)
            applied.layers.append(record)
    if plan.expert_width is not None:
        write_width(model, plan.expert_width)


def _check_narrower(width: int, now: int) -> None:
    if width > now:
        why = f"the teacher's experts have {now} neurons"
        raise ConfigError(f"experts cannot be widened to {width}", where="plan.expert_width", why=why)


def fit_rows(plan: Plan, material: Material) -> Tensor:
    """The first of the given rows that hold about `plan.action_tokens` tokens, at least one."""
    if material.ids_NS is None:
        raise _missing(f"the action {plan.action} is fitted on calibration tokens")
    return material.ids_NS[: max(1, plan.action_tokens // material.ids_NS.shape[1])]


def kept_in(plan: Plan, view: MoELayerView) -> list[int]:
    """The kept experts of a layer; all where the plan drops none."""
    return list(plan.kept.get(view.index, range(view.count)))


def _visitor(plan: Plan, material: Material, applied: Applied, act: Act | None, collect: Act | None) -> Visitor:
    """What is done in one layer, in the fixed order."""
    model = applied.model

    def visit(view: MoELayerView, tokens: LayerTokens) -> Tensor | None:
        record: dict[str, Any] = {"layer": view.index}
        kept = kept_in(plan, view)
        if plan.expert_width is not None:
            _narrow(view, plan, material, record)
        index_TK, weight_TK = student_routing(model, view, tokens.hidden_TD, kept, plan.top_k)
        fit = LayerFit(view, tokens.hidden_TD, tokens.output_TD, index_TK, weight_TK)
        layer = StudentLayer(view, kept, tokens, index_TK, weight_TK, fit, record)
        record["missed_after_dropping"] = fit.missed
        if act is not None:
            act(layer)
        if plan.compensate:
            record["ridge"] = refit(layer.fit)
        if collect is not None:
            collect(layer)
        record["missed"] = layer.fit.missed
        applied.layers.append(record)
        applied.down_energy[view.index] = _down_energy(layer.fit, kept)
        return layer.fit.output(tokens.output_TD) if plan.sequential else None

    return visit


def _narrow(view: MoELayerView, plan: Plan, material: Material, record: dict[str, Any]) -> Tensor:
    """Narrow one layer; returns the mean squares of the kept experts' activations that stay, [E', F]."""
    if material.statistics is None:
        raise _missing("the neurons that stay are chosen by the profile's statistics")
    assert plan.expert_width is not None
    sums_EF, count_E = (material.statistics.imatrix[name][view.position] for name in ("expert_down", "expert_count"))
    kept = kept_in(plan, view)
    neurons_EF, shares = narrow_layer(view, sums_EF, plan.expert_width)
    record["neuron_energy_kept"] = min(shares[expert] for expert in kept)
    means_EF = sums_EF.double().gather(1, neurons_EF) / count_E.double().clamp(min=1).unsqueeze(1)
    return means_EF[kept]


def _down_energy(fit: LayerFit, kept: list[int]) -> Tensor:
    """Mean square of every input column of the kept experts' down projections on the student's tokens, [E', F]."""
    width = fit.activations(next(iter(fit.slots))).shape[1]
    rows = [
        fit.activations(expert).double().square().mean(dim=0).cpu()
        if expert in fit.slots
        else torch.zeros(width).double()
        for expert in kept
    ]
    return torch.stack(rows)


def _missing(why: str) -> ConfigError:
    return ConfigError("the plan needs a profile", where="plan.json", why=why, next_command="moe-edge profile TEACHER")


@torch.no_grad()
def walk_layers(model: nn.Module, ids_NS: Tensor, visit: Visitor) -> None:
    """Run `model` over the rows and call `visit` in every MoE layer, from the bottom up.

    Args:
        visit: may return a routed output [T, D], which then replaces the layer's own.
    """
    views = moe_layers(model)
    progress = iter(track(views, "compress: layers"))
    with ExitStack() as undo:
        for view in views:
            undo.callback(view.experts.__dict__.pop, "forward", None)
            view.experts.forward = _visiting(view, visit, progress)
        device = next(model.parameters()).device
        body(model)(input_ids=ids_NS.long().to(device), use_cache=False)
        next(progress, None)


def _visiting(
    view: MoELayerView, visit: Visitor, progress: Iterator[object]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    answer = view.experts.forward

    def forward(hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        next(progress, None)
        output_TD = answer(hidden_TD, index_TK, weight_TK)
        view.experts.__dict__.pop("forward", None)  # the visitor may call the experts
        replaced_TD = visit(view, LayerTokens(hidden_TD, index_TK, weight_TK, output_TD))
        return output_TD if replaced_TD is None else replaced_TD.to(output_TD.dtype)

    return forward


@torch.no_grad()
def student_routing(
    model: nn.Module, view: MoELayerView, hidden_TD: Tensor, kept: Sequence[int], top_k: int
) -> tuple[Tensor, Tensor]:
    """How the student will route these tokens in this layer: (index [T, K] of the teacher's experts, weight [T, K])."""
    with masked(model, {view.index: list(kept)}, top_k):
        index_TK, weight_TK = route(view, hidden_TD)
    return torch.tensor(kept, device=index_TK.device)[index_TK], weight_TK
