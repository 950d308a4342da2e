"""report.md: the report for people, verdict first. Pure text out of a checked Report.

A number that was not measured is printed as `n/a` and its reason is listed below the table. Names from outside (models,
messages) are made inert: no table breaks, no HTML.
"""

from collections.abc import Sequence
from typing import Any

from moe_edge.contracts.report import Artifact, Report
from moe_edge.contracts.units import format_bytes
from moe_edge.reporting.markdown import inert, number, table
from moe_edge.reporting.plan_sections import plan_section, routing_section

__all__ = ["inert", "number", "render", "table"]


def render(report: Report) -> str:
    """The whole page."""
    sections = (
        _head, _results, _gates, _storage, plan_section, routing_section, _distillation, _parity, _stages, _machine, _definitions,
        _notes, _next,
    )  # fmt: skip
    return "\n\n".join(text for text in (section(report) for section in sections) if text) + "\n"


def _head(report: Report) -> str:
    passed = sum(gate.passed for gate in report.gates)
    lines = [
        f"# {report.verdict.upper()}: {inert(_name(report))} for {inert(report.target)}",
        f"{passed} of {len(report.gates)} gates passed. {_headline(report)}",
    ]
    if report.reasons:
        lines.append("\n".join(f"- {inert(reason)}" for reason in report.reasons))
    return "\n\n".join(lines)


def _name(report: Report) -> str:
    return str((report.teacher.model_extra or {}).get("name", "model"))


def _headline(report: Report) -> str:
    teacher, student = report.teacher, report.student
    average = " on average" if (student.model_extra or {}).get("experts_per_layer") else ""
    text = (
        f"{student.experts} of {teacher.experts} experts per layer are kept{average} (top-{student.top_k}); "
        f"{student.params_total / 1e6:.4g} M of {teacher.params_total / 1e6:.4g} M parameters."
    )
    quantized = [artifact for artifact in report.artifacts if artifact.format != "hf"]
    if quantized and teacher.bytes:
        smallest = min(quantized, key=lambda artifact: artifact.bytes)
        text += (
            f" The smallest file is {format_bytes(smallest.bytes)} ({teacher.bytes / smallest.bytes:.1f}x smaller than "
            f"the teacher's {format_bytes(teacher.bytes)}), {number(smallest.quality.kl_nats)} nats from the teacher."
        )
    return text


def _results(report: Report) -> str:
    models = [
        *([report.baseline] if report.baseline else []),
        *sorted(report.artifacts, key=lambda a: a.format != "hf"),
    ]
    if not models:
        return ""
    header = (
        "model", "size", "bits/weight", "KL to teacher, nats [95 %]", "KL to student", "top-1", "perplexity",
        "decode tok/s", "prefill tok/s", "TTFT ms", "peak MiB",
    )  # fmt: skip
    rows = [_result_row(report, model) for model in models]
    reasons = [f"- {inert(name)}: {inert(reason)}" for name, reason in _reasons(report, models)]
    return "\n\n".join(["## Results", table(header, rows), *(["\n".join(reasons)] if reasons else [])])


def _result_row(report: Report, model: Artifact) -> list[str]:
    quality, speed = model.quality, model.speed
    interval = quality.kl_nats_ci95
    kl = number(quality.kl_nats) + (f" [{number(interval[0])}, {number(interval[1])}]" if interval else "")
    return [
        _label(report, model), format_bytes(model.bytes), number(model.bits_per_weight), kl,
        number(quality.kl_to_student_nats), number(quality.top1_agreement), number(quality.perplexity, 4),
        number(speed.decode_tokens_per_s), number(speed.prefill_tokens_per_s), number(speed.ttft_ms_p50),
        number(model.memory.peak_rss_mib),
    ]  # fmt: skip


def _label(report: Report, model: Artifact) -> str:
    if model is report.baseline:
        return "teacher (transformers fp32)"
    if model.format == "hf":
        return "student (transformers fp32)"
    return f"{model.format.upper()} {model.quantization or ''}".strip()


def _reasons(report: Report, models: Sequence[Artifact]) -> list[tuple[str, str]]:
    found = []
    for model in models:
        parts = (model.quality.reason, model.quality.student_reason, model.speed.reason, model.memory.reason)
        if text := "; ".join(dict.fromkeys(part for part in parts if part)):
            found.append((_label(report, model), f"n/a because: {text}"))
    return found


def _gates(report: Report) -> str:
    rows = [
        (gate.artifact, gate.name, f"{gate.direction} {number(gate.limit)} {gate.unit}",
         number(gate.value) if gate.reason is None else f"n/a: {gate.reason}", "pass" if gate.passed else "FAIL")
        for gate in report.gates
    ]  # fmt: skip
    return "## Gates\n\n" + (table(("artifact", "gate", "limit", "value", ""), rows) if rows else "None is configured.")


def _storage(report: Report) -> str:
    """Where the bytes of every quantized file are, and which tensors got another type than the recipe names."""
    parts = [part for artifact in report.artifacts if (part := _classes(report, artifact))]
    return "\n\n".join(["## Bits per tensor class", *parts]) if parts else ""


def _classes(report: Report, artifact: Artifact) -> str:
    total = sum(artifact.bytes_by_class.values())
    if not total:
        return ""
    rows = [
        (name, format_bytes(size), f"{size / total:.1%}", number(artifact.bits_per_weight_by_class.get(name)))
        for name, size in sorted(artifact.bytes_by_class.items(), key=lambda item: (-item[1], item[0]))
    ]
    text = table((_label(report, artifact), "size", "share", "bits/weight"), rows)
    told = ", ".join(
        f"{inert(types)} in {tensors} tensor{'s' * (tensors > 1)}" for types, tensors in artifact.fallbacks.items()
    )
    return f"{text}\n\nRows that are no multiple of the type's block got another type: {told}." if told else text


def _distillation(report: Report) -> str:
    summary = report.distillation
    if not summary:
        return ""
    lines = ["## Distillation", inert(summary.get("reason", ""))]
    if summary.get("trained"):
        lines.append(table(("", "first tenth, or before", "last tenth, or after"), _training_rows(summary)))
        sources = ", ".join(
            f"{inert(one['stage'])} {inert(one.get('teacher', 'unknown'))}" for one in summary["stages"]
        )
        lines.append(
            f"{summary['tokens_trained']} tokens trained (logits of the teacher: {sources}); "
            f"the {inert(summary['kept'])} student went on. "
            f"Held-out KL here: {inert(summary['held_out_kl'])}, {summary['held_out_tokens']} calibration tokens that "
            f"were not trained on. CKA: {inert(summary['cka'])}."
        )
    return "\n\n".join(lines)


def _training_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The losses of every stage, then what they did to the judge's numbers."""
    rows = [
        (f"{stage['stage']}: {name.replace('_', ' ')}", number(first), number(last))
        for stage in summary["stages"]
        for name, (first, last) in stage["first_and_last"].items()
    ]
    pairs = (("held-out KL to the teacher, nats", "kl_nats"), ("teacher-student CKA, mean over layers", "cka_mean"))
    return [*rows, *((label, number(summary["before"][key]), number(summary["after"][key])) for label, key in pairs)]


_OUTCOME = {None: "not limited", True: "pass", False: "FAIL"}


def _parity(report: Report) -> str:
    files = [row for row in report.parity if "pair" not in row]
    pairs = [row for row in report.parity if "pair" in row]
    if not files:
        return ""
    header = (
        "reopened file against the HF student", "KL, nats", "max logit difference", "tokens clear of ties", "top-1",
        "perplexity", "greedy tokens", "tokenizer", "",
    )  # fmt: skip
    parts = ["## Parity", table(header, [_parity_row(row) for row in files])]
    if pairs:
        header = ("format against format", "KL, nats", "limit", "top-1", "")
        rows = [
            (row["artifact"], number(row["kl_nats"]), number(row["limit_kl_nats"]), number(row["top1_agreement"]),
             _OUTCOME[row["passed"]])
            for row in pairs
        ]  # fmt: skip
        parts.append(table(header, rows))
    return "\n\n".join(parts)


def _parity_row(row: dict[str, Any]) -> tuple[str, ...]:
    tokenizer = row.get("tokenizer")
    return (
        row["artifact"], number(row["kl_nats"]), number(row["max_abs_logit"]),
        f"{row['clear_tokens']}/{row.get('clear_candidates', row['n_tokens'])}", number(row["top1_agreement"]),
        f"{number(row['perplexity'])} ({number(row['student_perplexity'])})",
        f"{row['greedy_equal']}/{row['greedy_compared']}", "same" if tokenizer and tokenizer["equal"] else "n/a",
        _OUTCOME[row["passed"]] + (f" ({row['rule']})" if row.get("rule") else ""),
    )  # fmt: skip


def _stages(report: Report) -> str:
    rows = [(s.name, number(s.seconds), number(s.peak_rss_mib), "yes" if s.cached else "no") for s in report.stages]
    return "## Stages\n\n" + table(("stage", "seconds", "peak MiB", "reused"), rows) if rows else ""


def _machine(report: Report) -> str:
    facts = "; ".join(f"{name} {inert(value)}" for name, value in report.machine.items() if value is not None)
    versions = "; ".join(f"{name} {inert(value)}" for name, value in report.versions.items())
    return f"## Machine and versions\n\n{facts}\n\n{versions}" if facts or versions else ""


def _definitions(report: Report) -> str:
    return "## Definitions\n\n" + "\n".join(f"- `{name}`: {text}" for name, text in report.definitions.items())


def _notes(report: Report) -> str:
    return "## Notes\n\n" + "\n".join(f"- {inert(note)}" for note in report.notes) if report.notes else ""


def _next(report: Report) -> str:
    return "## Next\n\n```\n" + "\n".join(report.next_commands) + "\n```" if report.next_commands else ""
