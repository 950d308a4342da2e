"""compress: the plan applied to the teacher; writes model/, a plain transformers checkpoint.

The teacher is loaded in its own dtype, so that every tensor which the plan does not touch keeps its bytes. The student
is written beside its final name, loaded again, compared with the model in memory (the difference must be exactly 0)
and renamed; a killed run leaves no half-written model/. A teacher larger than memory has its experts dropped on disk.

Beside model/, where they apply: shared_core/ (the trainable form of a student with shared cores), merges.json (every
proposed pair and why it was or was not merged), layers.json (what each layer's output misses), imatrix.safetensors
(what the new down projections read).

Legend: N rows, S sequence, V vocabulary.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.compression.importance import FILE as IMPORTANCE
from moe_edge.compression.importance import save_importance
from moe_edge.compression.layers import Applied, Material
from moe_edge.compression.on_disk import WORKING_SHARE, drop_on_disk, fits_in_memory, only_drops
from moe_edge.compression.routing_health import compare, health_rows, observe
from moe_edge.compression.surgery import apply_plan, check_plan
from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.errors import ConfigError, MoeEdgeError
from moe_edge.contracts.plan import Plan
from moe_edge.families import family_of
from moe_edge.models.loading import load_model, save_student, stored_dtype
from moe_edge.models.students import (
    TRAINABLE,
    describe_model,
    describe_student,
    is_shared_core,
    load_student,
    plain_form,
    save_trainable,
)
from moe_edge.models.views import moe_layers
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.files import write_json_atomic
from moe_edge.storage.folders import written_beside
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics

log = logging.getLogger(__name__)
CHECK_TOKENS = 16
MERGES, LAYERS = "merges.json", "layers.json"


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
    if fits_in_memory(headers) and not layerwise:
        told = _in_memory(plan, headers, context)
    else:
        told = _on_disk(plan, headers, context.out)
    summary = describe_student(inspect_checkpoint(context.out / "model"))
    log.info("compress: %s, %d of %d experts per layer kept", plan.action, plan.experts_kept, plan.experts_total)
    return summary | {"action": plan.action} | told | {"teacher": describe_model(headers)}


def _in_memory(plan: Plan, headers: CheckpointHeaders, context: StageContext) -> dict[str, Any]:
    material, rows_NS = material_of(plan, context), None
    model = load_model(context.teacher, dtype=stored_dtype(headers)).to(_device(plan, headers))
    if plan.action in ("drop", "merge"):  # the others have no router, or one of their own
        rows_NS = health_rows(context.inputs.get("profile"))
    teacher, layers = observe(model, rows_NS), [view.index for view in moe_layers(model)]
    applied = apply_plan(model, plan, material)
    difference = write_student(applied, context.teacher, context.out)
    health = compare(teacher, observe(applied.model, rows_NS), plan.kept if plan.prunes else {}, layers)
    return {"reload_max_difference": difference} | _told(plan, applied) | health


def _on_disk(plan: Plan, headers: CheckpointHeaders, out: Path) -> dict[str, Any]:
    """A teacher larger than memory: dropped tensor by tensor, checked by digests instead of logits."""
    log.info("compress: dropping experts on disk, tensor by tensor")
    _remove_others(out)
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
    return "cuda" if torch.cuda.mem_get_info()[0] > WORKING_SHARE * headers.total_bytes else "cpu"


def write_student(applied: Applied, tokenizer_source: Path, out: Path) -> float:
    """Write model/ and what belongs beside it; returns the largest logits difference after reloading, which is 0."""
    model = applied.model.to("cpu")
    difference = 0.0
    _remove_others(out)
    if is_shared_core(model):
        save_trainable(model, tokenizer_source, out / TRAINABLE)
        difference = check_reload(model, out / TRAINABLE)
    plain = plain_form(model)
    with written_beside(out / "model") as folder:
        save_student(plain, tokenizer_source, folder)
        difference = max(difference, check_reload(plain, folder))
    save_importance(out, applied.down_energy)
    for name, records in ((MERGES, applied.pairs), (LAYERS, applied.layers)):
        if records:
            write_json_atomic(out / name, records)
    return difference


def _remove_others(out: Path) -> None:
    """What an earlier run with another plan may have left beside model/."""
    shutil.rmtree(out / TRAINABLE, ignore_errors=True)
    for name in (MERGES, LAYERS, IMPORTANCE):
        (out / name).unlink(missing_ok=True)


def check_reload(model: PreTrainedModel, folder: Path) -> float:
    """The reload difference, which is 0.

    Raises:
        MoeEdgeError: the reloaded model differs, so that saving or the disk is broken.
    """
    difference = reload_difference(model, folder)
    if difference != 0.0:
        why = f"largest logits difference {difference}, expected exactly 0"
        raise MoeEdgeError("the saved student differs from the one in memory", where=str(folder), why=why)
    return difference


@torch.inference_mode()
def reload_difference(model: PreTrainedModel, folder: Path) -> float:
    """Largest absolute logits difference on a few tokens between `model` and what `folder` loads to, in its dtype."""
    ids_1S = torch.arange(CHECK_TOKENS)[None] * 7919 % model.config.vocab_size
    return float((_logits(model, ids_1S) - _logits(load_student(folder, dtype=model.dtype), ids_1S)).abs().max())


def _logits(model: PreTrainedModel, ids_1S: Tensor) -> Tensor:
    return model(ids_1S).logits[0].float()


def _told(plan: Plan, applied: Applied) -> dict[str, Any]:
    """What the report can say about the action."""
    told: dict[str, Any] = {}
    if plan.action == "merge":
        told |= {"pairs_proposed": len(applied.pairs), "pairs_merged": sum(pair["accepted"] for pair in applied.pairs)}
    missed = [record["missed"] for record in applied.layers if "missed" in record]
    if missed:
        told["output_missed_mean"] = sum(missed) / len(missed)
    return told
