"""plan: which experts stay and how the student is stored, from headers, statistics and masked KL; changes nothing.

The budget is solved first, from headers alone. If experts must go, every criterion's choice is improved on by a search
over some calibration rows, and all of them are masked in the teacher on other rows, where the least KL wins; `random` is
always beside them, because on some models no criterion beats it. The KL of the winner is the build's prediction. Writes
plan.json: readable, editable, without tensors, the same bytes every time.

Shape suffixes: L MoE layers, E experts, N rows, S tokens of a row.
"""

import logging
from collections.abc import Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_edge.compression.layers import Material
from moe_edge.compression.on_disk import held_whole
from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.manifest import read_manifest
from moe_edge.contracts.plan import Plan, TriedShape
from moe_edge.models.students import describe_model
from moe_edge.planning.allocation import Feasible, header_plan, settle, shown_options
from moe_edge.planning.bits import Sensitivity
from moe_edge.planning.candidates import criteria_to_compare
from moe_edge.planning.decision import Quantization, bits_are_free, decide_by_priors, quantization_of
from moe_edge.planning.judging import Desk, calibration_rows, candidates_of, choose, honesty, thinner
from moe_edge.planning.measured_budget import check_safe, measure_budget, write_curve
from moe_edge.planning.options import largest_contexts
from moe_edge.planning.preview import KEEP_ALL, Preview, all_experts, make_plan
from moe_edge.planning.scorer import open_teacher
from moe_edge.planning.shape_trials import settle_shape
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.files import write_text_atomic
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics

log = logging.getLogger(__name__)


def run(context: StageContext) -> dict[str, Any]:
    """Write plan.json; returns {criterion, candidates, experts_kept, predicted_kl_nats, estimate, notes, ...}.

    Raises:
        InfeasibleError: nothing fits the budget, or the masked KL exceeds plan.max_kl_nats.
        ConfigError, InputRejected: as `header_plan`; a profile that does not belong to the teacher.
    """
    headers = inspect_checkpoint(context.teacher)
    feasible = header_plan(headers, context.config)
    material = cache(partial(_material, context, feasible))  # every shape that is tried asks for it
    preview = Preview(context.config, headers, material, held_whole(headers, context.config.profile.mode))
    if any(answer.needs_measuring for answer in (feasible, *feasible.others)):
        plan = _measured_plan(feasible, preview, context)
    else:
        why = "Every expert is kept, so there is no masked KL to measure and no criterion to choose."
        plan = make_plan(feasible, KEEP_ALL, all_experts(feasible), {}, (why,), quantization_of(feasible))
        plan = preview.finish(plan, feasible)
    write_text_atomic(context.out / "plan.json", plan.to_json())
    log.info(
        "plan: %d of %d experts, %s, predicted KL %s nats",
        plan.experts_kept, plan.experts_total, plan.main_label, plan.predicted_kl_nats,
    )  # fmt: skip
    return plan.model_dump(mode="json", by_alias=True, exclude={"kept"})


def _material(context: StageContext, feasible: Feasible) -> Material:
    """What a plan may be fitted on."""
    folder = context.inputs["profile"]
    ids_NS = torch.from_numpy(TokenRows.load(folder / "rows.safetensors").ids_NS)
    return Material(read_statistics(folder, feasible), ids_NS)


def _measured_plan(feasible: Feasible, preview: Preview, context: StageContext) -> Plan:
    """Settle top-k and width where they are free, score the choices by masked KL, take the least, and let "quantize harder"
    compete with it."""
    config = context.config
    rows = calibration_rows(context.inputs["profile"] / "rows.safetensors", config.plan.tokens)
    chosen = candidates_of(feasible, config, preview.statistics())
    criteria_to_compare(config.plan.criterion, chosen.stats)  # refuses before the teacher is loaded
    tried: list[TriedShape] = []
    sensitivity = None
    with open_teacher(context, preview.headers) as teacher:
        desk = Desk(config, chosen, teacher, rows)
        if feasible.others:
            feasible, tried, sensitivity = settle_shape(desk, preview, feasible)
        if feasible.keeps_all and not bits_are_free(feasible, config):
            plan = _reshaped_plan(desk, feasible, quantization_of(feasible))
        else:
            plan = _settled_plan(desk, feasible, context.out, sensitivity)
    return preview.finish(plan, feasible).model_copy(update={"shapes": tried})


def _reshaped_plan(desk: Desk, feasible: Feasible, quantization: Quantization) -> Plan:
    """Every expert stays; a lower top-k or narrower experts alone are measured."""
    kept, notes = all_experts(feasible), [desk.rows.where]
    results = dict(desk.score(feasible)({KEEP_ALL: kept}, desk.rows.judged_NS)) if feasible.alters else {}
    if results:
        nats = results[KEEP_ALL].kl_nats
        notes += check_safe(feasible, nats, None, desk.config.plan, f"{KEEP_ALL} {nats:.3f}")
    return make_plan(feasible, KEEP_ALL, kept, results, notes, quantization)


def _settled_plan(desk: Desk, feasible: Feasible, out: Path, sensitivity: Sensitivity | None = None) -> Plan:
    """Judge the candidates, settle how many experts stay and in which bits, and say what must be said."""
    config = desk.config
    free = bits_are_free(feasible, config)
    first = thinner(feasible)
    judged = desk.judge(first, searching=not free)  # where bits are free the count may still change: no search yet
    budget = measure_budget(
        feasible, config, desk.score(feasible), desk.teacher.model, desk.rows.judged_NS, desk.chosen.stats.imatrix,
        judged.ranking, partial(desk.chosen.kept, judged.ranking), sensitivity,
    )  # fmt: skip
    settled = budget.feasible if budget.free else settle(feasible, judged.best_nats)
    write_curve(out, budget.curve, config.plan, settled.choice.experts)
    if settled.keeps_all and settled.alters:
        return _reshaped_plan(desk, settled, budget.quantization)
    if settled.keeps_all:
        notes = [*judged.notes, f"The candidates' masked KL is that of keeping {first.choice.experts} experts."]
        return make_plan(settled, KEEP_ALL, all_experts(settled), judged.results, notes, budget.quantization)
    if free:
        judged = desk.judge(settled, searching=True)
    table = ", ".join(f"{name} {kl:.3f}" for name, kl in judged.ranked)
    notes = [*judged.notes, *check_safe(settled, judged.best_nats, budget.curve, config.plan, table)]
    notes += honesty(judged.best, judged.results) + desk.even_note(settled, judged)
    return make_plan(settled, judged.best, judged.choices[judged.best], judged.results, notes, budget.quantization)


def read_statistics(folder: Path, feasible: Feasible) -> Statistics:
    """The profile's statistics. Raises InputRejected when they are of a model with other layers or experts."""
    path = folder / "statistics.safetensors"
    stats, spec = Statistics.load(path), feasible.model.spec
    expected = (len(spec.moe_layers), spec.moe.experts)
    if tuple(stats.counts_LE.shape) != expected:
        raise InputRejected(
            "the profile belongs to another teacher",
            where=str(path),
            why=f"it has (MoE layers, experts) = {tuple(stats.counts_LE.shape)}, not {expected}",
            next_command="moe-edge profile TEACHER --fresh",
        )
    return stats


def dry_run(
    headers: CheckpointHeaders, config: BuildConfig, profile: Path | None = None, finished: Path | None = None
) -> dict[str, Any]:
    """What fits, what it costs and why, from headers alone (and what a profile or a finished plan tells, if there is one).

    Expected KLs are priors here; a finished plan has the measured ones.

    Args:
        profile: the folder of a finished profile.
        finished: the folder of a finished plan of this teacher.

    Returns:
        JSON-able {teacher, target, budget, choice, competitor, options, shapes, criteria, notes, measured}; sizes in bytes.

    Raises:
        As `header_plan`.
    """
    answer = header_plan(headers, config)
    feasible = decide_by_priors(answer, config)
    spec = feasible.model.spec
    return {
        "teacher": describe_model(headers),
        "target": config.target.name,
        "budget": config.target.budget.model_dump(mode="json", exclude_none=True),
        "choice": {
            "experts_kept": feasible.choice.experts,
            "experts_total": spec.moe.experts,
            "top_k": feasible.space.top_k,
            "expert_width": feasible.space.width,
            "quantization": feasible.choice.packing.label
            if feasible.choice.packing.format == "gguf"
            else feasible.quantization,
            "onnx_precision": feasible.onnx_precision,
            "estimate": feasible.choice.estimate.model_dump(mode="json"),
            "largest_contexts": largest_contexts(feasible.space, feasible.choice),
            "context_limit": spec.context_length,
        },
        "competitor": feasible.competitor,
        "options": [option.row() for option in shown_options(feasible)],
        "shapes": [other.choice.row() for other in (answer, *answer.others)] if answer.others else [],
        "criteria": _previews(feasible, config, profile),
        "notes": list(feasible.notes),
        "measured": _measured(finished, config),
    }


def _measured(folder: Path | None, config: BuildConfig) -> dict[str, Any] | None:
    """What a finished plan says; None where there is none, or it was made for other wishes."""
    manifest = read_manifest(folder) if folder else None
    if folder is None or manifest is None:
        return None
    wishes = config.model_dump(mode="json", by_alias=True, include={"plan", "target", "export"})
    made_for = [manifest.config.get(section) or {} for section in wishes]  # without what changes no stage
    pairs = zip(wishes.values(), made_for, strict=True)
    if not all(made_for) or any(wish.get(key) != said for wish, made in pairs for key, said in made.items()):
        return None
    plan = Plan.read(folder / "plan.json")
    return plan.model_dump(mode="json", by_alias=True, exclude={"kept", "merges"})


def _previews(feasible: Feasible, config: BuildConfig, profile: Path | None) -> list[dict[str, Any]]:
    """Per criterion, how much of the teacher's routing the kept experts carried; needs no model."""
    if profile is None or feasible.keeps_all or not (profile / "statistics.safetensors").is_file():
        return []
    stats = read_statistics(profile, feasible)
    chosen = candidates_of(feasible, config, stats)
    return [
        {
            "criterion": name,
            "routed_share_kept": _share(stats.counts_LE, kept.values()),
            "gate_share_kept": _share(stats.gate_sum_LE, kept.values()),
        }
        for name, kept in choose(feasible, config, chosen).items()
    ]


def _share(sums_LE: Tensor, kept: Collection[Sequence[int]]) -> float:
    """What the kept experts of every position hold of the total."""
    total = float(sums_LE.sum())
    held = sum(float(sums_E[list(ids)].sum()) for sums_E, ids in zip(sums_LE, kept, strict=True))
    return held / total if total else 0.0
