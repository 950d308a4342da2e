"""Losses on single experts: student experts pulled to groups of the teacher's, and pushed apart from each other.

Both run experts on the same few tokens, because a comparison on the tokens that each one was routed to would compare
different texts. CKA is debiased, so that a few hundred tokens suffice.

expert_cka: L = sum_j w_j (1 - CKA(E^S_j(X), sum_{i in G_j} a_i(X) E^T_i(X))), X the teacher's own expert inputs. The groups G_j
and the weights w_j (the share of tokens that the teacher routes to a group) are measured once, when the stage
begins, so that a resumed run aims at the same targets; a_i are the router's scores, brought to a sum of 1 per group.

expert_diversity: mean CKA between the student's experts; falls as they specialise. Their inputs are taken as given, so that only
experts move.

Shape suffixes: J experts of the student, E of the teacher, C chosen ones among them, N rows, B rows of a micro-batch, S
tokens of a row, T tokens, D model.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_edge.distillation.alignment import aligned_layers
from moe_edge.distillation.feature_terms import spread
from moe_edge.distillation.terms import MicroBatch, Needs, RecordsNothing, Term, TermContext, student_layers, unfit
from moe_edge.formulas.cka import cka_across, gram, hsic_across, normalise_rows
from moe_edge.formulas.cka_loss import MIN_TOKENS, cka_pair, mean_pairwise_cka, usable_tokens
from moe_edge.formulas.matching import expert_owners, group_outputs, group_usage
from moe_edge.models.kernels import differentiable_outputs
from moe_edge.models.taps import body, recorded_activations, width
from moe_edge.models.views import MoELayerView, expert_outputs, moe_layers, route, router_scores

log = logging.getLogger(__name__)
TOKENS = 256  # of a micro-batch: every expert runs on them
GROUP_TOKENS = 1024  # on which groups are measured, before training


@dataclass(frozen=True)
class LayerGroups:
    """One layer: whose outputs are a target for which student expert."""

    student: MoELayerView
    teacher: MoELayerView
    chosen: list[int]  # C ids of teacher experts
    owner_C: Tensor  # the student expert that each of them belongs to; -1: none
    weight_J: Tensor  # sums to 1


class ExpertCka(RecordsNothing):
    """Every student expert should see the text as its group of teacher experts does, run on the teacher's inputs.

    Raises:
        ConfigError: the student has no experts, another width, or none in a layer where the teacher has some.
    """

    name = "expert_cka"
    sampled = True

    def __init__(self, context: TermContext) -> None:
        self.layers = measured_groups(context)
        self.needs = Needs(routers=frozenset(layer.teacher.index for layer in self.layers))

    def loss(self, batch: MicroBatch) -> Tensor:
        """Mean over the layers of the weighted distances."""
        values = [self._layer(layer, batch) for layer in self.layers]
        return torch.stack(values).mean()

    def _layer(self, layer: LayerGroups, batch: MicroBatch) -> Tensor:
        hidden_TD = sampled_tokens(batch.teacher.expert_inputs[layer.teacher.index], batch.valid_BS)
        ours_JTD = differentiable_outputs(layer.student, hidden_TD)
        used_U = layer.weight_J.nonzero().squeeze(-1)
        if len(hidden_TD) < MIN_TOKENS or not len(used_U):
            return 0.0 * ours_JTD.float().sum()
        theirs_JTD = self._targets(layer, hidden_TD)
        distance_U = 1 - cka_pair(ours_JTD[used_U], theirs_JTD[used_U])
        return (layer.weight_J[used_U].to(distance_U.dtype) * distance_U).sum()

    @torch.no_grad()
    def _targets(self, layer: LayerGroups, hidden_TD: Tensor) -> Tensor:
        theirs_CTD = expert_outputs(layer.teacher, hidden_TD, layer.chosen).float()
        score_TC = router_scores(layer.teacher, hidden_TD)[:, layer.chosen]
        return group_outputs(theirs_CTD, score_TC, layer.owner_C, layer.student.count)


class ExpertDiversity:
    """The student's experts of a layer should see the same tokens differently.

    Raises:
        ConfigError: the student has no experts, or a single one per layer.
    """

    name = "expert_diversity"
    sampled = True
    needs = Needs()

    def __init__(self, context: TermContext) -> None:
        views = _even_layers(self.name, context.student)
        self.views = [views[position] for position in aligned_layers(len(views))]
        if self.views[0].count < 2:
            raise unfit(self.name, "several experts to compare", "the student has a single expert per layer")
        self._activations: dict[int, Tensor] = {}

    @contextmanager
    def recording(self, student: nn.Module) -> Iterator[None]:
        """While open, a forward pass of the student leaves the inputs of its experts here."""
        with recorded_activations(student, routers=[view.index for view in self.views]) as activations:
            self._activations = activations.expert_inputs
            yield

    def loss(self, batch: MicroBatch) -> Tensor:
        """Mean CKA of all pairs of experts, averaged over the layers."""
        values = []
        for view in self.views:
            hidden_TD = sampled_tokens(self._activations[view.index].detach(), batch.valid_BS)
            outputs_JTD = differentiable_outputs(view, hidden_TD)
            enough = len(hidden_TD) >= MIN_TOKENS
            values.append(mean_pairwise_cka(outputs_JTD) if enough else 0.0 * outputs_JTD.float().sum())
        self._activations = {}
        return torch.stack(values).mean()


def _even_layers(name: str, student: nn.Module) -> list[MoELayerView]:
    """The student's MoE layers. Raises ConfigError where it has none, or padding experts, which have nothing to compare."""
    views = student_layers(name, student)
    if any(len(view.real) < view.count for view in views):
        raise unfit(name, "as many experts in every layer", "this student's layers are padded (plan.uneven)")
    return views


def sampled_tokens(hidden_TD: Tensor, valid_BS: Tensor, most: int = TOKENS) -> Tensor:
    """At most `most` tokens of a micro-batch, evenly spread over those that are no padding and no attention sink."""
    hidden_BSD = hidden_TD.view(*valid_BS.shape, -1)
    usable_BS = torch.stack([usable_tokens(row_SD, valid) for row_SD, valid in zip(hidden_BSD, valid_BS, strict=True)])
    return hidden_TD[spread(usable_BS.flatten().nonzero().squeeze(-1), most)]


def measured_groups(context: TermContext) -> list[LayerGroups]:
    """The groups of the aligned layers, measured on the context's rows; raises as `ExpertCka`."""
    student, teacher = context.student, context.teacher
    assert teacher is not None
    if context.inputs.ids_NS is None:
        raise ValueError("expert_cka needs rows of text to measure its groups on")
    pairs = _aligned_pairs(context, _even_layers(ExpertCka.name, student), moe_layers(teacher))
    if width(student) != width(teacher):
        why = f"its experts cannot read the teacher's inputs: {width(student)} wide, not {width(teacher)}"
        raise unfit(ExpertCka.name, "a student as wide as the teacher", why)
    rows = max(1, GROUP_TOKENS // context.inputs.ids_NS.shape[1])
    inputs = _expert_inputs(teacher, [theirs.index for _, theirs in pairs], context.inputs.ids_NS[:rows])
    return [_measure(context, ours, theirs, inputs[theirs.index]) for ours, theirs in pairs]


def _aligned_pairs(
    context: TermContext, ours: Sequence[MoELayerView], theirs: Sequence[MoELayerView]
) -> list[tuple[MoELayerView, MoELayerView]]:
    """The student's aligned MoE layers and their teacher layers; only those count that have experts on both sides."""
    by_index = {view.index: view for view in theirs}
    pairs = [
        (view, by_index[context.layer_map[view.index]]) for view in ours if context.layer_map[view.index] in by_index
    ]
    if not pairs:
        why = "no student layer with experts is mapped to a teacher layer with experts"
        raise unfit(ExpertCka.name, "another layer_map", why)
    return [pairs[position] for position in aligned_layers(len(pairs))]


@torch.no_grad()
def _expert_inputs(teacher: nn.Module, layers: list[int], ids_NS: Tensor) -> dict[int, list[Tensor]]:
    """{layer: blocks of usable expert inputs [T, D], at most TOKENS each}."""
    inputs: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for ids_S in ids_NS:
        ids_1S = ids_S.long()[None].to(next(teacher.parameters()).device)
        with recorded_activations(teacher, routers=layers) as activations:
            body(teacher)(input_ids=ids_1S, use_cache=False)
        for layer, hidden_TD in activations.expert_inputs.items():
            usable_TD = sampled_tokens(hidden_TD, torch.ones_like(ids_1S, dtype=torch.bool), GROUP_TOKENS)
            inputs[layer] += torch.split(usable_TD, TOKENS)
    return inputs


@torch.no_grad()
def _measure(
    context: TermContext, student: MoELayerView, teacher: MoELayerView, hidden: Sequence[Tensor]
) -> LayerGroups:
    chosen = _chosen_experts(context, student, teacher)
    total: list[Tensor] | None = None
    usage_E = torch.zeros(teacher.count, dtype=torch.float64, device=hidden[0].device)
    for hidden_TD in hidden:
        ours_JTT = gram(normalise_rows(differentiable_outputs(student, hidden_TD)))
        theirs_CTT = gram(normalise_rows(expert_outputs(teacher, hidden_TD, chosen)))
        parts = hsic_across(ours_JTT, theirs_CTT)
        total = list(parts) if total is None else [old + new for old, new in zip(total, parts, strict=True)]
        usage_E += torch.bincount(route(teacher, hidden_TD)[0].flatten(), minlength=teacher.count)
    assert total is not None
    owner_C = expert_owners(cka_across(*total))
    weight_J = group_usage(usage_E[chosen], owner_C, student.count)
    log.info(
        "distill: layer %d learns from %d experts in %d groups", student.index, len(chosen), int((weight_J > 0).sum())
    )
    return LayerGroups(student, teacher, chosen, owner_C, weight_J)


def _chosen_experts(context: TermContext, student: MoELayerView, teacher: MoELayerView) -> list[int]:
    """The share of the teacher's experts whose outputs the student's layer follows most, ascending ids.

    What a layer follows it can learn to produce; experts without evidence come last.
    """
    count = max(1, round(context.stage.expert_share * teacher.count))
    if count == teacher.count:
        return list(range(count))
    if context.inputs.expert_layer_cka is None:
        raise ValueError("expert_share below 1 needs the table of expert-to-layer CKA")
    cka_E = context.inputs.expert_layer_cka[teacher.position, :, student.index].nan_to_num(nan=-torch.inf)
    return sorted(cka_E.argsort(descending=True, stable=True)[:count].tolist())


EXPERT_TERMS: dict[str, Callable[[TermContext], Term]] = {
    "expert_cka": ExpertCka,
    "expert_diversity": ExpertDiversity,
}
