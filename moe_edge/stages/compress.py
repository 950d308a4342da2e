"""compress: the plan applied to the teacher; writes model/, a plain transformers checkpoint.

The teacher is loaded in its own dtype, so that every tensor which the plan does not touch keeps its bytes; what lies beside
model/ is described in compression/student.py. A teacher larger than memory has its experts dropped on disk.

Shape suffixes: N rows, S tokens of a row.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from moe_edge.compression.layers import Applied, Material
from moe_edge.compression.on_disk import drop_on_disk, only_drops
from moe_edge.compression.routing_health import compare, health_rows, observe
from moe_edge.compression.student import remove_others, write_student
from moe_edge.compression.surgery import apply_plan, check_plan
from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.plan import Plan
from moe_edge.families import family_of
from moe_edge.models.loading import load_model, stored_dtype
from moe_edge.models.students import describe_model, describe_student
from moe_edge.models.views import moe_layers
from moe_edge.process.placement import can_be_edited
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.folders import written_beside
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics

log = logging.getLogger(__name__)


def run(context: StageContext) -> dict[str, Any]:
    """Write `context.out / model`; returns what the student is: params_total, params_active, experts, top_k, bytes, ...

    Raises:
        ConfigError: there is no readable plan, or it does not fit the teacher; raised before any weight is read.
        InputRejected: the teacher cannot be used, or the action does not know its family.
        ResourceProblem: the teacher does not fit in memory, and the plan does more than drop experts.
    """
    plan = read_plan(context.inputs["plan"] / "plan.json")
    headers = inspect_checkpoint(context.teacher)
    spec = family_of(headers.config).spec(headers.config)
    check_plan(plan, spec.moe.experts, spec.moe_layers)
    layerwise = context.config.profile.mode == "layerwise" and only_drops(plan)  # as asked, whatever would fit
    if can_be_edited(headers) and not layerwise:
        found = _in_memory(plan, headers, context)
    else:
        found = _on_disk(plan, headers, context.out)
    summary = describe_student(inspect_checkpoint(context.out / "model"))
    log.info("compress: %s, %d of %d experts per layer kept", plan.action, plan.experts_kept, plan.experts_total)
    return summary | {"action": plan.action} | found | {"teacher": describe_model(headers)}


def _in_memory(plan: Plan, headers: CheckpointHeaders, context: StageContext) -> dict[str, Any]:
    material, rows_NS = material_of(plan, context), None
    model = load_model(context.teacher, dtype=stored_dtype(headers)).to(_device(plan, headers))
    if plan.action in ("drop", "merge"):  # the others have no router, or one of their own
        rows_NS = health_rows(context.inputs.get("profile"))
    teacher, layers = observe(model, rows_NS), [view.index for view in moe_layers(model)]
    applied = apply_plan(model, plan, material)
    difference = write_student(applied, context.teacher, context.out)
    health = compare(teacher, observe(applied.model, rows_NS), plan.kept if plan.prunes else {}, layers)
    return {"reload_max_difference": difference} | _action_summary(plan, applied) | health


def _on_disk(plan: Plan, headers: CheckpointHeaders, out: Path) -> dict[str, Any]:
    """A teacher larger than memory: dropped tensor by tensor, checked by digests instead of logits."""
    log.info("compress: dropping experts on disk, tensor by tensor")
    remove_others(out)
    with written_beside(out / "model") as folder:
        parts = drop_on_disk(headers, plan, folder)
    return {"reload_max_difference": 0.0, "parts_compared": parts}


def read_plan(path: Path) -> Plan:
    """The plan, which a user may have edited. Raises ConfigError when it is missing or contradicts itself."""
    try:
        return Plan.read(path)
    except OSError as error:
        raise ConfigError("there is no plan", where=str(path), next_command="moe-edge plan") from error
    except (ValidationError, ValueError) as error:
        raise ConfigError("the plan cannot be used", where=str(path), why=str(error)) from error


def material_of(plan: Plan, context: StageContext) -> Material:
    """The profile's statistics and rows, as far as the plan needs them."""
    folder = context.inputs.get("profile")
    if folder is None or not (plan.fits or plan.expert_width is not None):
        return Material()
    rows_NS = torch.from_numpy(TokenRows.load(folder / "rows.safetensors").ids_NS)
    return Material(Statistics.load(folder / "statistics.safetensors"), rows_NS)


def _device(plan: Plan, headers: CheckpointHeaders) -> str:
    """An action that is fitted runs on the GPU, if there is one with room for the teacher."""
    if not plan.fits or not torch.cuda.is_available():
        return "cpu"
    return "cuda" if can_be_edited(headers, "cuda") else "cpu"


def _action_summary(plan: Plan, applied: Applied) -> dict[str, Any]:
    """What the report can say about the action."""
    summary: dict[str, Any] = {}
    if plan.action == "merge":
        summary |= {
            "pairs_proposed": len(applied.pairs),
            "pairs_merged": sum(pair["accepted"] for pair in applied.pairs),
        }
    missed = [record["missed"] for record in applied.layers if "missed" in record]
    if missed:
        summary["output_missed_mean"] = sum(missed) / len(missed)
    return summary
