"""Gates: the target's limits, held against what was measured; one result per limit and artifact, and the verdict.

Nothing is measured here, so that a changed limit changes the verdict at once and no stage runs again. Everything that depends on
the limits is decided here: which of them cannot apply, what must be said about that, and whether a speed counts for the target.
A limit whose value could not be measured fails with the reason. No gates at all is not a pass. A row of GATES is a new gate: a
field of `target.gates`, its unit, its direction, and where the value comes from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from moe_edge.contracts.artifacts import ValidationSummary
from moe_edge.contracts.measurements import Artifact
from moe_edge.contracts.report import GateResult, Judgement, Verdict
from moe_edge.contracts.target import Gates, Target

FULL_PRECISION = frozenset({None, "F32", "F16", "BF16", "fp32", "fp16"})


@dataclass(frozen=True)
class GateRow:
    """How one gate is read from an artifact; `value` gets the artifact and the teacher's bytes."""

    unit: str
    direction: Literal["at most", "at least"]
    value: Callable[[Artifact, int], float | None]
    reason: Callable[[Artifact], str | None]


def _perplexity_ratio(artifact: Artifact, teacher_bytes: int) -> float | None:
    student, teacher = artifact.quality.perplexity, artifact.quality.teacher_perplexity
    return student / teacher if student is not None and teacher else None


def _quality_reason(artifact: Artifact) -> str | None:
    return artifact.quality.reason


def _teacher_share(artifact: Artifact, teacher_bytes: int) -> float | None:
    return artifact.bytes / teacher_bytes if teacher_bytes else None


GATES: dict[str, GateRow] = {
    "kl_to_student_nats": GateRow(
        "nats/token", "at most", lambda a, _: a.quality.kl_to_student_nats, lambda a: a.quality.student_reason
    ),
    "kl_to_teacher_nats": GateRow("nats/token", "at most", lambda a, _: a.quality.kl_nats, _quality_reason),
    "top1_agreement_to_teacher": GateRow("share", "at least", lambda a, _: a.quality.top1_agreement, _quality_reason),
    "perplexity_ratio": GateRow("ratio", "at most", _perplexity_ratio, _quality_reason),
    "bytes_ratio": GateRow("ratio", "at most", _teacher_share, lambda _: "the teacher's size is unknown"),
    "decode_tokens_per_s": GateRow(
        "tokens/s", "at least", lambda a, _: a.speed.decode_tokens_per_s, lambda a: a.speed.reason
    ),
}


def judge(validation: ValidationSummary, target: Target) -> Judgement:
    """Every limit of the target on every artifact that it applies to, and the verdict."""
    omitted = _omitted_gates(target.gates, validation)
    results = apply_gates(target.gates, validation.artifacts, validation.baseline.bytes, omitted)
    outcome, reasons = verdict(results, validation.artifacts)
    return Judgement(
        artifacts=[labelled(artifact, target.gates) for artifact in validation.artifacts],
        baseline=labelled(validation.baseline, target.gates),
        gates=results,
        verdict=outcome,
        reasons=reasons,
        notes=[*validation.notes, *_notes(target, omitted)],
        machine=validation.machine,
        versions=validation.versions,
    )


def device_label(gates: Gates) -> str:
    """'target' where the machine that measures is the one that will run the artifact; 'host': its speed says nothing of it."""
    return "target" if gates.host_speed else "host"


def labelled(artifact: Artifact, gates: Gates) -> Artifact:
    """The artifact with what its device stands for."""
    return artifact.model_copy(update={"device": artifact.device | {"label": device_label(gates)}})


def _omitted_gates(gates: Gates, validation: ValidationSummary) -> list[str]:
    """The gates that cannot apply: the host's speed is not the target's; the student alone is its own reference."""
    exported = any(artifact.format != "hf" for artifact in validation.artifacts)
    speed = [] if gates.host_speed else ["decode_tokens_per_s"]
    student = [] if validation.with_student and exported else ["kl_to_student_nats"]
    return [*speed, *student]


def _notes(target: Target, omitted: list[str]) -> list[str]:
    notes = []
    if not target.gates.host_speed:
        where = f"on this host, not on the target '{target.name}'"
        notes.append(f"speed and memory were measured {where}, and are not gated")
    if "kl_to_student_nats" in omitted and target.gates.kl_to_student_nats is not None:
        notes.append("the gate kl_to_student_nats was left out: no HF student is known for this artifact")
    return notes


def gated(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """The artifacts that gates apply to: the quantized ones, or every exported one when none is quantized."""
    exported = [artifact for artifact in artifacts if artifact.format != "hf"] or list(artifacts)
    return [artifact for artifact in exported if artifact.quantization not in FULL_PRECISION] or exported


def apply_gates(
    gates: Gates, artifacts: Sequence[Artifact], teacher_bytes: int, without: Sequence[str] = ()
) -> list[GateResult]:
    """Every limit of `gates` on every gated artifact, in the order of GATES.

    Args:
        gates: the target's limits; null = not gated.
        artifacts: measured artifacts.
        teacher_bytes: size of the teacher's weights.
        without: gates that cannot apply here (no student is known, or the speed is another machine's).
    """
    limits = {name: getattr(gates, name) for name in GATES if name not in without}
    return [
        _apply(name, float(limit), artifact, teacher_bytes)
        for name, limit in limits.items()
        if limit is not None
        for artifact in gated(artifacts)
    ]


def _apply(name: str, limit: float, artifact: Artifact, teacher_bytes: int) -> GateResult:
    row = GATES[name]
    value = row.value(artifact, teacher_bytes)
    passed = value is not None and (value <= limit if row.direction == "at most" else value >= limit)
    reason = (row.reason(artifact) or "not measured") if value is None else None
    return GateResult(
        name=name,
        artifact=artifact.path,
        limit=limit,
        value=value,
        unit=row.unit,
        direction=row.direction,
        passed=passed,
        reason=reason,
    )


def verdict(results: Sequence[GateResult], artifacts: Sequence[Artifact]) -> tuple[Verdict, list[str]]:
    """'pass' or 'fail' with the reasons: a missed gate, an artifact that failed to run, or no gates at all."""
    reasons = [] if results else ["no gate is configured, and nothing checked is not a pass"]
    for gate in results:
        if not gate.passed:
            value = f"{gate.value:.4g}" if gate.value is not None else f"not measured ({gate.reason})"
            reasons.append(
                f"{gate.artifact}: {gate.name} is {value}, limit {gate.direction} {gate.limit:.4g} {gate.unit}"
            )
    for artifact in artifacts:
        if artifact.quality.kl_nats is None:
            reasons.append(f"{artifact.path}: no quality: {artifact.quality.reason}")
        if artifact.speed.decode_tokens_per_s is None:
            reasons.append(f"{artifact.path}: no speed: {artifact.speed.reason}")
    return ("fail" if reasons else "pass"), reasons
