"""report.md: the report for people, verdict first. Pure text out of a checked Report.

A number that was not measured is printed as `n/a` and its reason is listed below the table.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_edge.contracts.artifacts import DistillSummary
from moe_edge.contracts.measurements import Artifact
from moe_edge.contracts.report import Report
from moe_edge.contracts.units import format_bytes
from moe_edge.reporting.markdown import bullets, facts, inert, interval, number, paragraphs, section, table
from moe_edge.reporting.plan_sections import plan_section, routing_section

_RESULTS = (
    "model",
    "size",
    "bits/weight",
    "KL to teacher, nats [95 %]",
    "KL to student",
    "top-1",
    "perplexity",
    "decode tok/s",
    "prefill tok/s",
    "TTFT ms",
    "peak MiB",
)
_GATES = ("artifact", "gate", "limit", "value", "")
_TRAINING = ("", "first tenth, or before", "last tenth, or after")
_PARITY = (
    "reopened file against the HF student",
    "KL, nats",
    "max logit difference",
    "tokens clear of ties",
    "top-1",
    "perplexity",
    "greedy tokens",
    "tokenizer",
    "",
)
_PARITY_PAIRS = ("format against format", "KL, nats", "limit", "top-1", "")
_STAGES = ("stage", "seconds", "peak MiB", "reused")
_OUTCOME = {None: "not limited", True: "pass", False: "FAIL"}


def render(report: Report) -> str:
    """The whole page."""
    return (
        paragraphs(
            _head(report),
            _results(report),
            _gates(report),
            _storage(report),
            plan_section(report),
            routing_section(report),
            _distillation(report),
            _parity(report),
            _stages(report),
            section("Machine and versions", facts(report.machine), facts(report.versions)),
            _definitions(report),
            section("Notes", bullets(report.notes)),
            section("Next", "```\n" + "\n".join(report.next_commands) + "\n```" if report.next_commands else ""),
        )
        + "\n"
    )


def _head(report: Report) -> str:
    name = (report.teacher.model_extra or {}).get("name", "model")
    passed = sum(gate.passed for gate in report.gates)
    return paragraphs(
        f"# {report.verdict.upper()}: {inert(name)} for {inert(report.target)}",
        f"{passed} of {len(report.gates)} gates passed. {_headline(report)}",
        bullets(report.reasons),
    )


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
    """Every model's numbers: the teacher, the student, then the files; and why some are missing."""
    artifacts = sorted(report.artifacts, key=lambda artifact: artifact.format != "hf")
    models = [*([report.baseline] if report.baseline else []), *artifacts]
    rows = [_result_row(report, model) for model in models]
    return section("Results", table(_RESULTS, rows), bullets(_missing(report, models)))


def _result_row(report: Report, model: Artifact) -> list[str]:
    quality, speed = model.quality, model.speed
    kl = number(quality.kl_nats) + (f" {interval(quality.kl_nats_ci95)}" if quality.kl_nats_ci95 else "")
    return [
        _label(report, model),
        format_bytes(model.bytes),
        number(model.bits_per_weight),
        kl,
        number(quality.kl_to_student_nats),
        number(quality.top1_agreement),
        number(quality.perplexity, 4),
        number(speed.decode_tokens_per_s),
        number(speed.prefill_tokens_per_s),
        number(speed.ttft_ms_p50),
        number(model.memory.peak_rss_mib),
    ]


def _label(report: Report, model: Artifact) -> str:
    if model is report.baseline:
        return "teacher (transformers fp32)"
    if model.format == "hf":
        return "student (transformers fp32)"
    return f"{model.format.upper()} {model.quantization or ''}".strip()


def _missing(report: Report, models: Sequence[Artifact]) -> list[str]:
    """Why numbers of a model are null."""
    found = []
    for model in models:
        parts = (model.quality.reason, model.quality.student_reason, model.speed.reason, model.memory.reason)
        if text := "; ".join(dict.fromkeys(part for part in parts if part)):
            found.append(f"{_label(report, model)}: n/a because: {text}")
    return found


def _gates(report: Report) -> str:
    rows = []
    for gate in report.gates:
        limit = f"{gate.direction} {number(gate.limit)} {gate.unit}"
        value = number(gate.value) if gate.reason is None else f"n/a: {gate.reason}"
        rows.append((gate.artifact, gate.name, limit, value, "pass" if gate.passed else "FAIL"))
    return section("Gates", table(_GATES, rows) or "None is configured.")


def _storage(report: Report) -> str:
    """Where the bytes of every quantized file are, and which tensors got another type than the recipe names."""
    return section("Bits per tensor class", *(_classes(report, artifact) for artifact in report.artifacts))


def _classes(report: Report, artifact: Artifact) -> str:
    total = sum(artifact.bytes_by_class.values())
    if not total:
        return ""
    rows = [
        (name, format_bytes(size), f"{size / total:.1%}", number(artifact.bits_per_weight_by_class.get(name)))
        for name, size in sorted(artifact.bytes_by_class.items(), key=lambda item: (-item[1], item[0]))
    ]
    others = ", ".join(
        f"{inert(types)} in {tensors} tensor{'s' * (tensors > 1)}" for types, tensors in artifact.fallbacks.items()
    )
    return paragraphs(
        table((_label(report, artifact), "size", "share", "bits/weight"), rows),
        f"Rows that are no multiple of the type's block got another type: {others}." if others else "",
    )


def _distillation(report: Report) -> str:
    summary = report.distillation
    if summary is None:
        return ""
    if not summary.trained:
        return section("Distillation", inert(summary.reason))
    sources = ", ".join(f"{inert(stage.stage)} {inert(stage.teacher)}" for stage in summary.stages)
    return section(
        "Distillation",
        inert(summary.reason),
        table(_TRAINING, _training_rows(summary)),
        f"{summary.tokens_trained} tokens trained (logits of the teacher: {sources}); "
        f"the {inert(summary.kept)} student went on. "
        f"Held-out KL here: {inert(summary.held_out_kl)}, {summary.held_out_tokens} calibration tokens that "
        f"were not trained on. CKA: {inert(summary.cka)}.",
    )


def _training_rows(summary: DistillSummary) -> Iterable[tuple[str, str, str]]:
    """The losses of every stage, then what they did to the student on held-out rows."""
    for stage in summary.stages:
        for name, (first, last) in stage.first_and_last.items():
            yield f"{stage.stage}: {name.replace('_', ' ')}", number(first), number(last)
    if summary.before and summary.after:
        before, after = summary.before, summary.after
        yield "held-out KL to the teacher, nats", number(before.kl_nats), number(after.kl_nats)
        yield "teacher-student CKA, mean over layers", number(before.cka_mean), number(after.cka_mean)


def _parity(report: Report) -> str:
    files = [_parity_row(row) for row in report.parity if "pair" not in row]
    pairs = [_pair_row(row) for row in report.parity if "pair" in row]
    return section("Parity", table(_PARITY, files), table(_PARITY_PAIRS, pairs)) if files else ""


def _parity_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    tokenizer = row.get("tokenizer")
    return (
        row["artifact"],
        number(row["kl_nats"]),
        number(row["max_abs_logit"]),
        f"{row['clear_tokens']}/{row.get('clear_candidates', row['n_tokens'])}",
        number(row["top1_agreement"]),
        f"{number(row['perplexity'])} ({number(row['student_perplexity'])})",
        f"{row['greedy_equal']}/{row['greedy_compared']}",
        "same" if tokenizer and tokenizer["equal"] else "n/a",
        _OUTCOME[row["passed"]] + (f" ({row['rule']})" if row.get("rule") else ""),
    )


def _pair_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    kl, limit, agreement = (number(row[name]) for name in ("kl_nats", "limit_kl_nats", "top1_agreement"))
    return row["artifact"], kl, limit, agreement, _OUTCOME[row["passed"]]


def _stages(report: Report) -> str:
    rows = [(s.name, number(s.seconds), number(s.peak_rss_mib), "yes" if s.cached else "no") for s in report.stages]
    return section("Stages", table(_STAGES, rows))


def _definitions(report: Report) -> str:
    return section("Definitions", "\n".join(f"- `{name}`: {text}" for name, text in report.definitions.items()))
