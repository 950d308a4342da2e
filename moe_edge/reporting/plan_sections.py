"""The report's sections about the plan: what was chosen, what it was expected to cost and what it really costs, the
safe-ratio curve, and how the experts' load changed. Pure text out of a checked Report.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_edge.contracts.plan import Candidate, Plan, TriedShape
from moe_edge.contracts.report import Prediction, Report
from moe_edge.contracts.units import format_bytes
from moe_edge.reporting.markdown import bullets, inert, interval, number, paragraphs, section, table

CURVE_PICTURE = "plan/curve.svg"
_BITS = ("tensors (@ decoder layers)", "type instead of the recipe's")
_CANDIDATES = ("criterion", "masked KL, nats", "95 %", "tokens")
_SHAPES = ("top-k", "neurons", "experts", "type", "masked KL, nats", "refitted", "with bits", "file", "tokens/s")
_PREDICTIONS = (
    "KL, nats",
    "predicted: experts",
    "predicted: bits",
    "predicted: sum",
    "achieved, after recovery",
    "achieved: bits and runtime",
)
_HEALTH = {
    "load_entropy": "entropy of the load, 1 = even",
    "variation": "coefficient of variation of the load, 0 = even",
    "largest_over_fair": "busiest expert over its even share",
    "gate_mass": "sum of a token's mixing weights",
    "dead_experts": "experts without a token, all layers",
    "teachers_gate_mass_kept": "share of the teacher's gate mass that the kept experts had",
}


def plan_section(report: Report) -> str:
    """The choice, the candidates, prediction against measurement, and the curve."""
    plan = report.plan
    if plan is None:
        return ""
    return section(
        "Plan",
        _choice(plan),
        _expectations(report, plan),
        _predictions(report.predictions, plan),
        table(_BITS, plan.quantization_by_class.items()),
        table(_SHAPES, [_shape_row(shape) for shape in plan.shapes]),
        table(_CANDIDATES, [_candidate_row(candidate, plan) for candidate in plan.candidates]),
        inert(plan.competitor or ""),
        _curve(report.curve),
    )


def _choice(plan: Plan) -> str:
    uneven = "on average, uneven " if plan.uneven else ""
    width = "" if plan.expert_width is None else f" of {plan.expert_width} neurons"
    return (
        f"{plan.action}: {plan.experts_kept} of {plan.experts_total} experts per layer {uneven}"
        f"({plan.estimate.routed_expert_share_kept:.1%} of the routed-expert parameters), top-{plan.top_k}{width}, "
        f"chosen by {inert(plan.criterion)}; GGUF {inert(plan.main_label)}, ONNX {inert(plan.onnx_precision)}."
    )


def _expectations(report: Report, plan: Plan) -> str:
    """What was predicted of the student, beside what its stages measured."""
    student = next((artifact for artifact in report.artifacts if artifact.format == "hf"), None)
    trained = report.distillation
    before = trained.before.kl_nats if trained and trained.before else None
    measured = student.quality.kl_nats if student else None
    estimate = plan.estimate
    return (
        f"KL to the teacher, nats per token: predicted before any change {number(plan.predicted_kl_nats)}, "
        f"{'refitted, ' if plan.compensate else ''}before training {number(before)} "
        "(held-out calibration rows), "
        f"of the student {number(measured)} (held-out text). "
        f"Predicted file {format_bytes(estimate.file_bytes)}, "
        f"peak memory {format_bytes(estimate.peak_memory_bytes)} with {_planned_context(plan)}, "
        f"decode {number(estimate.decode_tokens_per_s)} tokens/s (roofline of the target, +-25 %)."
        f"{_used_cache(report)}"
    )


def _planned_context(plan: Plan) -> str:
    """The planned context, and how far it could go."""
    reach = ", ".join(f"{tokens} in {precision}" for precision, tokens in plan.largest_contexts.items())
    text = f"{plan.estimate.context_length} tokens of context in {plan.estimate.kv_precision}"
    return f"{text} (largest that fits: {reach})" if reach else text


def _used_cache(report: Report) -> str:
    used = sorted({str(a.device["kv_cache"]) for a in report.artifacts if "kv_cache" in a.device})
    return f" The GGUF files were judged and timed with a KV cache in {', '.join(used)}." if used else ""


def _predictions(found: Sequence[Prediction], plan: Plan) -> str:
    """Expected against achieved KL of every quantized file."""
    rows = [
        (
            row.artifact,
            number(row.masked_kl_nats),
            number(row.quantization_kl_nats),
            number(row.kl_nats),
            number(row.achieved_kl_nats),
            number(row.achieved_quantization_kl_nats),
        )
        for row in found
    ]
    return paragraphs(table(_PREDICTIONS, rows), _what_they_mean(found[0], plan)) if rows else ""


def _what_they_mean(row: Prediction, plan: Plan) -> str:
    """The definitions of predicted and achieved, side by side, so that nobody compares what is not comparable."""
    tokens = f", {plan.candidates[0].n_tokens} calibration tokens" if plan.candidates else ""
    source = "measured on the teacher" if row.quantization_source == "measured" else "a prior from another model"
    recovery = "the refit of the down projections and training" if plan.compensate else "training"
    return (
        f"Predicted: KL(teacher || teacher with the dropped experts and neurons masked{tokens}), plus what the bits alone "
        f"cost ({source}); nothing is recovered in it. Achieved: KL(teacher || the file) on held-out text, after {recovery}, "
        "so it should be lower; only the bits are comparable one to one (achieved: KL(student || the file))."
    )


def _shape_row(shape: TriedShape) -> tuple[Any, ...]:
    """What another top-k and width would have cost, where the plan was free to choose."""
    return (
        f"top-{shape.top_k}",
        shape.expert_width or "all",
        shape.experts_kept,
        inert(shape.quantization),
        number(shape.masked_kl_nats),
        number(shape.refitted_kl_nats),
        number(shape.kl_nats),
        format_bytes(shape.file_bytes),
        number(shape.decode_tokens_per_s),
    )


def _candidate_row(candidate: Candidate, plan: Plan) -> tuple[Any, ...]:
    chosen = candidate.criterion == plan.criterion
    name = f"**{candidate.criterion}** (chosen)" if chosen else candidate.criterion
    return name, number(candidate.kl_nats), interval(candidate.kl_nats_ci95), candidate.n_tokens


def _curve(curve: Mapping[str, Any] | None) -> str:
    """curve.json as its picture, a table and the verdict."""
    if not curve:
        return ""
    rows = [
        (point["experts"], f"{point['share']:.1%}", number(point["kl_nats"]), interval(point["kl_nats_ci95"]))
        for point in curve["points"]
    ]
    safe = curve["fewest_safe_experts"]
    verdict = f"At most {number(curve['limit_nats'])} nats down to {safe} experts." if safe else "No count is safe."
    return paragraphs(
        f"![masked KL against experts kept]({CURVE_PICTURE})",
        table(("experts kept", "share", f"masked KL by {inert(curve['criterion'])}, nats", "95 %"), rows),
        f"{verdict} ({curve['n_tokens']} calibration tokens, before recovery.)",
    )


def routing_section(report: Report) -> str:
    """Load of the experts before and after the experts were dropped."""
    health = report.routing_health
    if health is None:
        return ""
    names = dict.fromkeys([*health.teacher, *health.student])
    rows = [(_HEALTH[name], number(health.teacher.get(name)), number(health.student.get(name))) for name in names]
    header = (f"mean over layers, {health.tokens} calibration tokens", "teacher", "student before training")
    return section("Routing health", table(header, rows), bullets(health.alarms, "Alarm: "))
