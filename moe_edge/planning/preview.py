"""From a decision to a finished plan, and what its student will lose before training where that can be seen.

A plan that refits is tried on a copy of the teacher, because masking cannot predict the refit. That takes room for a second
copy and the time of `compress`; without the room a plan is judged by masking alone.

Shape suffixes: N rows, S tokens of a row.

What a plan's student loses before any training: the plan is applied to a copy of the teacher and judged against it.

Masking predicts what dropping costs, but cannot see what the refit of the down projections wins back, and that differs
between shapes: on the 134.8 M benchmark model it turned .494 nats of dropped experts into .116, and .342 nats of silent
neurons into .286. So where a second copy of the teacher fits in memory, shapes are compared by this number.

Shape suffixes: N rows, S tokens of a row, V vocabulary.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.compression.layers import Material
from moe_edge.compression.surgery import apply_plan
from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.plan import Candidate, Plan
from moe_edge.planning.actions import with_action
from moe_edge.planning.allocation import Feasible
from moe_edge.planning.candidates import Kept
from moe_edge.planning.decision import Quantization
from moe_edge.planning.masking import MaskedKl, batches_of, logits_of, row_kl, summarise
from moe_edge.planning.options import largest_contexts
from moe_edge.planning.uneven import as_uneven
from moe_edge.process.placement import fits_in_memory
from moe_edge.storage.statistics import Statistics

log = logging.getLogger(__name__)
KEEP_ALL = "keep-all"
PREVIEW_TOKENS = 4096  # a comparison needs no more, and every shape takes as long as `compress`
PREVIEWED_ACTIONS = ("drop", "merge")  # the others are fitted for minutes per layer, and need training in any case


@dataclass(frozen=True)
class Preview:
    """What a decision becomes."""

    config: BuildConfig
    headers: CheckpointHeaders
    material: Callable[[], Material]  # the profile's statistics and rows
    compress_in_memory: bool  # will `compress` hold the whole teacher? Only then can it refit

    def finish(self, plan: Plan, feasible: Feasible) -> Plan:
        """`plan` completed by what the configured action needs."""
        plan = with_action(plan, self.config, feasible.model.spec, self.statistics, self.compress_in_memory)
        return as_uneven(plan, feasible)

    def statistics(self) -> Statistics:
        """The profile's."""
        statistics = self.material().statistics
        assert statistics is not None
        return statistics

    def kl(self, plan: Plan, model: PreTrainedModel | None, ids_NS: Tensor) -> MaskedKl | None:
        """What the student of a finished plan loses before training; None where nothing is refitted, or without room.

        Args:
            model: the teacher in memory; None where it is streamed.
            ids_NS: rows to judge on.
        """
        if model is None or not plan.compensate or plan.action not in PREVIEWED_ACTIONS:
            return None
        if not fits_in_memory(self.headers, model.dtype, model.device):
            return None
        log.info("plan: trying the refit of %s", _in_words(plan))
        fewer = plan.model_copy(update={"action_tokens": min(plan.action_tokens, PREVIEW_TOKENS)})
        return refitted_kl(model, fewer, self.material(), ids_NS)


def _in_words(plan: Plan) -> str:
    width = "" if plan.expert_width is None else f" of {plan.expert_width} neurons"
    return f"{plan.experts_kept} experts{width}, top-{plan.top_k}"


def all_experts(feasible: Feasible) -> Kept:
    """The choice that drops nothing."""
    spec = feasible.model.spec
    return {layer: list(range(spec.moe.experts)) for layer in spec.moe_layers}


def make_plan(
    feasible: Feasible,
    criterion: str,
    kept: Kept,
    results: Mapping[str, MaskedKl],
    notes: Sequence[str],
    quantization: Quantization,
) -> Plan:
    """A decision as a document, not yet finished; candidates in ascending KL."""
    ranked = sorted(results.items(), key=lambda item: item[1].kl_nats)
    return Plan(
        criterion=criterion,
        experts_total=feasible.model.spec.moe.experts,
        experts_kept=feasible.choice.experts,
        uneven=len({len(ids) for ids in kept.values()}) > 1,
        top_k=feasible.space.top_k,
        teacher_top_k=feasible.model.spec.moe.top_k,
        expert_width=feasible.space.width,
        kept={layer: list(ids) for layer, ids in kept.items()},
        quantization=feasible.quantization,
        quantization_by_class=dict(feasible.choice.packing.mix),
        quantization_kl_nats=dict(quantization.nats),
        quantization_kl_source=quantization.source,
        onnx_precision=feasible.onnx_precision,
        predicted_kl_nats=results[criterion].kl_nats if criterion in results else None,
        candidates=[
            Candidate(criterion=name, kl_nats=result.kl_nats, kl_nats_ci95=result.ci95, n_tokens=result.n_tokens)
            for name, result in ranked
        ],
        estimate=feasible.choice.estimate,
        largest_contexts=largest_contexts(feasible.space, feasible.choice),
        competitor=feasible.competitor,
        notes=[*feasible.notes, *notes],
    )


@torch.no_grad()
def refitted_kl(model: PreTrainedModel, plan: Plan, material: Material, ids_NS: Tensor) -> MaskedKl:
    """KL(teacher || the student that `compress` would write), nats per token; the teacher stays as it is.

    Args:
        material: what the plan is fitted on.
        ids_NS: rows to judge on; those that the plan is fitted on would flatter it.

    Raises:
        As `surgery.apply_plan`.
    """
    student = apply_plan(copy.deepcopy(model), plan, material).model
    batches = batches_of(model, ids_NS)
    kl_N = torch.cat([row_kl(logits_of(model, batch_NS), logits_of(student, batch_NS)) for batch_NS in batches])
    return summarise(kl_N, ids_NS.numel())
