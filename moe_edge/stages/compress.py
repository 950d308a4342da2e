"""compress: the plan applied to the teacher; writes model/, a plain transformers checkpoint.

The teacher is loaded in its own dtype, so that every tensor which the plan does not touch keeps its bytes; what lies beside
model/ is described in compression/student.py. A teacher larger than memory has its experts dropped on disk.

Shape suffixes: N rows, S tokens of a row.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor

from moe_edge.compression.layers import Applied, Material
from moe_edge.compression.on_disk import drop_on_disk, only_drops, require_only_drops
from moe_edge.compression.routing_health import compare, observe
from moe_edge.compression.student import remove_others, write_student
from moe_edge.compression.surgery import apply_plan, check_plan
from moe_edge.contracts.artifacts import CompressSummary, Placement, PlanFolder, ProfileFolder
from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.measurements import ModelInfo
from moe_edge.contracts.plan import Plan
from moe_edge.contracts.row_split import RowSplit
from moe_edge.models.loading import load_model, stored_dtype
from moe_edge.models.students import describe_model, describe_student
from moe_edge.models.views import moe_layers
from moe_edge.process.placement import settled, to_edit
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.folders import written_beside
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics

log = logging.getLogger(__name__)


def run(
    config: BuildConfig, teacher: Teacher, out: Path, *, profile: ProfileFolder, plan: PlanFolder
) -> CompressSummary:
    """Write `out / model` and say what the student is.

    Raises:
        ConfigError: there is no readable plan, or it does not fit the teacher; raised before any weight is read.
        InputRejected: the teacher cannot be used, or the action does not know its family.
        ResourceProblem: the teacher does not fit in memory, and the plan does more than drop experts.
    """
    wanted = plan.plan
    check_plan(wanted, teacher.spec.moe.experts, teacher.spec.moe_layers)
    placement = settled(out, lambda: _place(config, teacher, wanted))
    if placement.whole:
        summary = _in_memory(config, teacher, out, wanted, profile, placement)
    else:
        summary = _on_disk(teacher, out, wanted)
    log.info("compress: %s, %d of %d experts per layer kept", wanted.action, wanted.experts_kept, wanted.experts_total)
    return summary


def _place(config: BuildConfig, teacher: Teacher, plan: Plan) -> Placement:
    """Raises ResourceProblem before anything is kept, so that the same command works once there is memory."""
    streamed = config.profile.mode == "layerwise" and only_drops(plan)  # as asked, whatever would fit
    placement = to_edit(teacher.headers, streamed=streamed, accelerate=plan.fits)
    if not placement.whole:
        require_only_drops(teacher.headers, plan)
    return placement


def _in_memory(
    config: BuildConfig, teacher: Teacher, out: Path, plan: Plan, profile: ProfileFolder, placement: Placement
) -> CompressSummary:
    ids_NS = torch.from_numpy(TokenRows.load(profile.rows).ids_NS).long()
    split = RowSplit(*ids_NS.shape)
    model = load_model(teacher.path, dtype=stored_dtype(teacher.headers))
    model.to(placement.device)  # type: ignore[arg-type]  # transformers hides nn.Module.to
    routed = plan.action in ("drop", "merge")  # the others have no router, or one of their own
    health = split.health()
    rows_NS: Tensor | None = ids_NS[health.start : health.stop] if routed else None
    before, layers = observe(model, rows_NS), [view.index for view in moe_layers(model)]
    fit = split.fit(plan.action_tokens, config.plan.tokens)
    applied = apply_plan(model, plan, _material(plan, profile, ids_NS[fit.start : fit.stop]))
    difference = write_student(applied, teacher.path, out)
    after = observe(applied.model, rows_NS)
    summary = _summary(teacher, out, plan, reload_max_difference=difference, **_achieved(plan, applied))
    return summary.model_copy(
        update={"routing_health": compare(before, after, plan.kept if plan.prunes else {}, layers)}
    )


def _material(plan: Plan, profile: ProfileFolder, fit_NS: Tensor) -> Material:
    """The profile's statistics and the rows to fit on, as far as the plan needs them."""
    if not (plan.fits or plan.expert_width is not None):
        return Material()
    return Material(Statistics.load(profile.statistics), fit_NS)


def _on_disk(teacher: Teacher, out: Path, plan: Plan) -> CompressSummary:
    """A teacher larger than memory: dropped tensor by tensor, checked by digests instead of logits."""
    log.info("compress: dropping experts on disk, tensor by tensor")
    remove_others(out)
    with written_beside(out / "model") as folder:
        parts = drop_on_disk(teacher.headers, plan, folder)
    return _summary(teacher, out, plan, reload_max_difference=0.0, parts_compared=parts)


def _summary(teacher: Teacher, out: Path, plan: Plan, **achieved: float) -> CompressSummary:
    student = describe_student(inspect_checkpoint(out / "model")) | {"action": plan.action} | achieved
    return CompressSummary(
        teacher=ModelInfo.model_validate(describe_model(teacher.headers)), student=ModelInfo.model_validate(student)
    )


def _achieved(plan: Plan, applied: Applied) -> dict[str, float]:
    """What the report can say about the action."""
    found: dict[str, float] = {}
    if plan.action == "merge":
        found |= {"pairs_proposed": len(applied.pairs), "pairs_merged": sum(pair["accepted"] for pair in applied.pairs)}
    missed = [record["missed"] for record in applied.layers if "missed" in record]
    if missed:
        found["output_missed_mean"] = sum(missed) / len(missed)
    return found
