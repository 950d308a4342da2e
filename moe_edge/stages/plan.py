"""plan: which experts stay and how the student is stored, from headers, statistics and masked KL; changes nothing.

The budget is solved first, from headers alone. If experts must go, every criterion's choice is improved on by a search
over some calibration rows, and all of them are masked in the teacher on other rows, where the least KL wins; `random` is
always beside them, because on some models no criterion beats it. The KL of the winner is the build's prediction. Writes
plan.json: readable, editable, without tensors, the same bytes every time.

Shape suffixes: L MoE layers, E experts, N rows, S tokens of a row.
"""

import logging
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_edge.compression.actions import check_action, with_action
from moe_edge.compression.allocation import Feasible, header_plan, settle, shown_options
from moe_edge.compression.candidates import Kept, criteria_to_compare
from moe_edge.compression.decision import Quantization, bits_are_free, quantization_of
from moe_edge.compression.masking import MaskedKl
from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.plan import Candidate, Plan
from moe_edge.families.counting import describe_model
from moe_edge.stages.plan_budget import check_safe, measure_budget, write_curve
from moe_edge.stages.plan_judge import Desk, calibration_rows, candidates_of, choose, honesty, student_top_k
from moe_edge.stages.plan_teacher import open_teacher
from moe_edge.storage.checkpoint import CheckpointHeaders, inspect_checkpoint
from moe_edge.storage.files import write_text_atomic
from moe_edge.storage.statistics import Statistics

log = logging.getLogger(__name__)
KEEP_ALL = "keep-all"


def run(context: StageContext) -> dict[str, Any]:
    """Write plan.json; returns {criterion, candidates, experts_kept, predicted_kl_nats, estimate, notes, ...}.

    Raises:
        InfeasibleError: nothing fits the budget, or the masked KL exceeds plan.max_kl_nats.
        ConfigError, InputRejected: as `header_plan`; a profile that does not belong to the teacher.
    """
    headers = inspect_checkpoint(context.teacher)
    feasible = header_plan(headers, context.config)
    check_action(context.config, headers, feasible.model.spec)
    if changes_routing(feasible):
        plan = _measured_plan(feasible, headers, context)
    else:
        why = "Every expert is kept, so there is no masked KL to measure and no criterion to choose."
        plan = make_plan(feasible, KEEP_ALL, _all_experts(feasible), {}, (why,), quantization_of(feasible))
    plan = with_action(
        plan, context.config, feasible.model.spec, lambda: read_statistics(context.inputs["profile"], feasible)
    )
    write_text_atomic(context.out / "plan.json", plan.to_json())
    log.info(
        "plan: %d of %d experts, %s, predicted KL %s nats",
        plan.experts_kept, plan.experts_total, plan.main_label, plan.predicted_kl_nats,
    )  # fmt: skip
    return plan.model_dump(mode="json", by_alias=True, exclude={"kept"})


def changes_routing(feasible: Feasible) -> bool:
    """Will the student route differently from the teacher?"""
    return not feasible.keeps_all or feasible.space.top_k != feasible.model.spec.moe.top_k


def _all_experts(feasible: Feasible) -> Kept:
    spec = feasible.model.spec
    return {layer: list(range(spec.moe.experts)) for layer in spec.moe_layers}


def _measured_plan(feasible: Feasible, headers: CheckpointHeaders, context: StageContext) -> Plan:
    """Score the choices by masked KL, take the least, and let "quantize harder" compete with it."""
    config, folder = context.config, context.inputs["profile"]
    rows = calibration_rows(folder / "rows.safetensors", config.plan.tokens)
    if feasible.keeps_all:  # a lower top-k alone
        with open_teacher(context, headers, student_top_k(feasible)) as teacher:
            results = dict(teacher.score({KEEP_ALL: _all_experts(feasible)}, rows.judged_NS))
        return make_plan(feasible, KEEP_ALL, _all_experts(feasible), results, [rows.where], quantization_of(feasible))
    chosen = candidates_of(feasible, config, read_statistics(folder, feasible))
    criteria_to_compare(config.plan.criterion, chosen.stats)  # refuses before the teacher is loaded
    with open_teacher(context, headers, student_top_k(feasible)) as teacher:
        return _settled_plan(Desk(config, chosen, teacher, rows), feasible, context.out)


def _settled_plan(desk: Desk, feasible: Feasible, out: Path) -> Plan:
    """Judge the candidates, settle how many experts stay and in which bits, and say what must be said."""
    config = desk.config
    free = bits_are_free(feasible, config)
    judged = desk.judge(feasible, searching=not free)  # where bits are free the count may still change: no search yet
    budget = measure_budget(
        feasible, config, desk.teacher.score, desk.teacher.model, desk.rows.judged_NS, desk.chosen.stats.imatrix,
        judged.ranking, partial(desk.chosen.kept, judged.ranking),
    )  # fmt: skip
    settled = budget.feasible if budget.free else settle(feasible, judged.best_nats)
    write_curve(out, budget.curve, config.plan, settled.choice.experts)
    if settled.keeps_all:
        return make_plan(settled, KEEP_ALL, _all_experts(settled), judged.results, judged.notes, budget.quantization)
    if free:
        judged = desk.judge(settled, searching=True)
    table = ", ".join(f"{name} {kl:.3f}" for name, kl in judged.ranked)
    notes = [*judged.notes, *check_safe(settled, judged.best_nats, budget.curve, config.plan, table)]
    notes += honesty(judged.best, judged.results)
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


def make_plan(
    feasible: Feasible,
    criterion: str,
    kept: Kept,
    results: dict[str, MaskedKl],
    notes: Sequence[str],
    quantization: Quantization,
) -> Plan:
    """The plan as a document; candidates in ascending KL."""
    ranked = sorted(results.items(), key=lambda item: item[1].kl_nats)
    return Plan(
        criterion=criterion,
        experts_total=feasible.model.spec.moe.experts,
        experts_kept=feasible.choice.experts,
        top_k=feasible.space.top_k,
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
        competitor=feasible.competitor,
        notes=[*feasible.notes, *notes],
    )


def dry_run(headers: CheckpointHeaders, config: BuildConfig, profile: Path | None = None) -> dict[str, Any]:
    """What fits, what it costs and why, from headers alone (and the statistics of a profile, if there is one).

    Returns:
        JSON-able {teacher, target, budget, choice, competitor, options, criteria, notes}; sizes in bytes.

    Raises:
        As `header_plan`.
    """
    feasible = header_plan(headers, config)
    spec = feasible.model.spec
    check_action(config, headers, spec)
    return {
        "teacher": describe_model(headers),
        "target": config.target.name,
        "budget": config.target.budget.model_dump(mode="json", exclude_none=True),
        "choice": {
            "experts_kept": feasible.choice.experts,
            "experts_total": spec.moe.experts,
            "top_k": feasible.space.top_k,
            "quantization": feasible.quantization,
            "onnx_precision": feasible.onnx_precision,
            "estimate": feasible.choice.estimate.model_dump(mode="json"),
        },
        "competitor": feasible.competitor,
        "options": [option.row() for option in shown_options(feasible)],
        "criteria": _previews(feasible, config, profile),
        "notes": list(feasible.notes),
    }


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
