"""The report's sections about the plan: what was chosen, what it was expected to cost and what it really costs, the
safe-ratio curve, and how the experts' load changed. Pure text out of a checked Report.
"""

from collections.abc import Sequence
from typing import Any

from moe_edge.contracts.report import Prediction, Report
from moe_edge.contracts.units import format_bytes
from moe_edge.reporting.markdown import NOT_MEASURED, inert, number, table

CURVE_PICTURE = "plan/curve.svg"


def plan_section(report: Report) -> str:
    """The choice, the candidates, prediction against measurement, and the curve."""
    plan = report.plan
    if not plan:
        return ""
    share = plan["estimate"]["routed_expert_share_kept"]
    lines = [
        f"{plan['action']}: {plan['experts_kept']} of {plan['experts_total']} experts per layer "
        f"{'on average, uneven ' if plan.get('uneven') else ''}"
        f"({share:.1%} of the routed-expert parameters){_shape(plan)}, chosen by {inert(plan['criterion'])}; "
        f"GGUF {inert(_label(plan))}, ONNX {inert(plan['onnx_precision'])}.",
        _prediction(report, plan),
        _predictions(report.predictions, plan),
        _bits(plan["quantization_by_class"]),
        _shapes(plan),
        _candidates(plan),
        inert(plan["competitor"]) if plan.get("competitor") else "",
        _curve(report.curve),
    ]
    return "## Plan\n\n" + "\n\n".join(line for line in lines if line)


def _label(plan: dict[str, Any]) -> str:
    return f"{plan['quantization']}-mix" if plan["quantization_by_class"] else str(plan["quantization"])


def _shape(plan: dict[str, Any]) -> str:
    width = "" if plan["expert_width"] is None else f" of {plan['expert_width']} neurons"
    return f", top-{plan['top_k']}{width}"


def _shapes(plan: dict[str, Any]) -> str:
    """What other top-k and widths would have cost, where the plan was free to choose."""
    rows = [
        (f"top-{s['top_k']}", s["expert_width"] or "all", s["experts_kept"], inert(s["quantization"]),
         number(s["masked_kl_nats"]), number(s["refitted_kl_nats"]), number(s["kl_nats"]),
         format_bytes(s["file_bytes"]), number(s["decode_tokens_per_s"]))
        for s in plan.get("shapes", [])
    ]  # fmt: skip
    header = ("top-k", "neurons", "experts", "type", "masked KL, nats", "refitted", "with bits", "file", "tokens/s")
    return table(header, rows) if rows else ""


def _candidates(plan: dict[str, Any]) -> str:
    rows = [
        (f"**{c['criterion']}** (chosen)" if c["criterion"] == plan["criterion"] else c["criterion"],
         number(c["kl_nats"]), _interval(c.get("kl_nats_ci95")), c["n_tokens"])
        for c in plan["candidates"]
    ]  # fmt: skip
    return table(("criterion", "masked KL, nats", "95 %", "tokens"), rows) if rows else ""


def _interval(interval: Sequence[float] | None) -> str:
    return f"[{number(interval[0])}, {number(interval[1])}]" if interval else NOT_MEASURED


def _prediction(report: Report, plan: dict[str, Any]) -> str:
    student = next((artifact for artifact in report.artifacts if artifact.format == "hf"), None)
    before = (report.distillation or {}).get("before", {}).get("kl_nats")
    measured = student.quality.kl_nats if student else None
    estimate = plan["estimate"]
    return (
        f"KL to the teacher, nats per token: predicted before any change {number(plan['predicted_kl_nats'])}, "
        f"{'refitted, ' if plan['compensate'] else ''}before training {number(before)} "
        "(held-out calibration rows), "
        f"of the student {number(measured)} (held-out text). "
        f"Predicted file {format_bytes(estimate['file_bytes'])}, "
        f"peak memory {format_bytes(estimate['peak_memory_bytes'])} with {_cache(plan)}, "
        f"decode {number(estimate['decode_tokens_per_s'])} tokens/s (roofline of the target, +-25 %)."
        f"{_used_cache(report)}"
    )


def _cache(plan: dict[str, Any]) -> str:
    """The planned context, and how far it could go."""
    estimate, largest = plan["estimate"], plan.get("largest_contexts", {})
    reach = ", ".join(f"{tokens} in {precision}" for precision, tokens in largest.items())
    text = f"{estimate['context_length']} tokens of context in {estimate['kv_precision']}"
    return f"{text} (largest that fits: {reach})" if reach else text


def _used_cache(report: Report) -> str:
    used = sorted({str(a.device["kv_cache"]) for a in report.artifacts if "kv_cache" in a.device})
    return f" The GGUF files were judged and timed with a KV cache in {', '.join(used)}." if used else ""


def _predictions(found: Sequence[Prediction], plan: dict[str, Any]) -> str:
    """Expected against achieved KL of every quantized file."""
    rows = [
        (
            row.artifact, number(row.masked_kl_nats), number(row.quantization_kl_nats), number(row.kl_nats),
            number(row.achieved_kl_nats), number(row.achieved_quantization_kl_nats),
        )
        for row in found
    ]  # fmt: skip
    if not rows:
        return ""
    header = (
        "KL, nats", "predicted: experts", "predicted: bits", "predicted: sum", "achieved, after recovery",
        "achieved: bits and runtime",
    )  # fmt: skip
    return "\n\n".join([table(header, rows), _what_they_mean(found[0], plan)])


def _what_they_mean(row: Prediction, plan: dict[str, Any]) -> str:
    """The definitions of predicted and achieved, side by side, so that nobody compares what is not comparable."""
    tokens = next((f", {c['n_tokens']} calibration tokens" for c in plan["candidates"]), "")
    source = "measured on the teacher" if row.quantization_source == "measured" else "a prior from another model"
    recovery = "the refit of the down projections and training" if plan["compensate"] else "training"
    return (
        f"Predicted: KL(teacher || teacher with the dropped experts and neurons masked{tokens}), plus what the bits alone "
        f"cost ({source}); nothing is recovered in it. Achieved: KL(teacher || the file) on held-out text, after {recovery}, "
        "so it should be lower; only the bits are comparable one to one (achieved: KL(student || the file))."
    )


def _bits(mix: dict[str, str]) -> str:
    rows = [(name, kind) for name, kind in mix.items()]
    return table(("tensors (@ decoder layers)", "type instead of the recipe's"), rows) if rows else ""


def _curve(curve: dict[str, Any] | None) -> str:
    if not curve:
        return ""
    rows = [
        (point["experts"], f"{point['share']:.1%}", number(point["kl_nats"]), _interval(point["kl_nats_ci95"]))
        for point in curve["points"]
    ]
    safe = curve["fewest_safe_experts"]
    verdict = f"At most {number(curve['limit_nats'])} nats down to {safe} experts." if safe else "No count is safe."
    return (
        f"![masked KL against experts kept]({CURVE_PICTURE})\n\n"
        + table(("experts kept", "share", f"masked KL by {inert(curve['criterion'])}, nats", "95 %"), rows)
        + f"\n\n{verdict} ({curve['n_tokens']} calibration tokens, before recovery.)"
    )


def routing_section(report: Report) -> str:
    """Load of the experts before and after the experts were dropped."""
    health = report.routing_health
    if not health:
        return ""
    names = list(dict.fromkeys([*health["teacher"], *health["student"]]))
    rows = [(_HEALTH[name], number(health["teacher"].get(name)), number(health["student"].get(name))) for name in names]
    heading = f"mean over layers, {health['tokens']} calibration tokens"
    lines = ["## Routing health", table((heading, "teacher", "student before training"), rows)]
    lines += [f"- Alarm: {inert(alarm)}" for alarm in health["alarms"]]
    return "\n\n".join(lines)


_HEALTH = {
    "load_entropy": "entropy of the load, 1 = even",
    "variation": "coefficient of variation of the load, 0 = even",
    "largest_over_fair": "busiest expert over its even share",
    "gate_mass": "sum of a token's mixing weights",
    "dead_experts": "experts without a token, all layers",
    "teachers_gate_mass_kept": "share of the teacher's gate mass that the kept experts had",
}
