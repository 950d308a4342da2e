"""validate: what the delivered files really do, from their own outputs, and whether that meets the target's gates.

Quality of every artifact against the teacher and the HF student on held-out text; speed and memory in fresh processes.
Writes results.json, cells/ (one file per measured model, which a rerun reuses) and raw/ (every timestamp).
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.plan import Plan
from moe_edge.contracts.report import Artifact, Quality
from moe_edge.devices.detect import HF, detect, weight_bytes
from moe_edge.devices.harness import FAILURE_ERRORS
from moe_edge.devices.transport import open_transport
from moe_edge.evaluation.cells import IS_TEACHER, Candidate, Session, assemble, judge_all, measure_all
from moe_edge.metrics.gates import apply_gates, verdict
from moe_edge.models.loading import load_tokenizer
from moe_edge.process import host
from moe_edge.storage.files import write_json_atomic
from moe_edge.storage.rows import TokenRows
from moe_edge.texts.rows import heldout_rows

EMPTY_ROWS = np.zeros((0, 0), dtype=np.int64)


def run(context: StageContext) -> dict[str, Any]:
    """Measure every artifact of a build; returns artifacts, baseline (the teacher), gates, verdict, reasons, notes."""
    transport = open_transport(context.config.validate_.device)
    rows_NS = held_out(context.config, context.teacher, context.inputs.get("profile"))
    session = Session(context.config, rows_NS, context.out, transport, kv_cache=planned_cache(context))
    return validate_build(session, context)


def planned_cache(context: StageContext) -> str:
    """The precision of the KV cache that the plan counted with: the GGUF files are validated in it."""
    return Plan.read(context.inputs["plan"] / "plan.json").estimate.kv_precision


def wished_cache(config: BuildConfig) -> str:
    """The target's precision where there is no plan; auto is float16."""
    asked = config.target.runtime.kv_cache
    return "f16" if asked == "auto" else asked


def held_out(config: BuildConfig, teacher: Path, profile: Path | None = None) -> np.ndarray:
    """Token ids [N, S] of the held-out text in the teacher's tokenizer; none of it may occur in the profile's rows."""
    settings, length = config.validate_, config.calibration.sequence_length
    seen = TokenRows.load(profile / "rows.safetensors") if profile else None
    return heldout_rows(settings.text, load_tokenizer(teacher), settings.tokens, length, seen).ids_NS


def validate_build(session: Session, context: StageContext) -> dict[str, Any]:
    """The build's artifacts, student and teacher through one session."""
    run_folder = context.out.parent
    exported = [Candidate(run_folder / row["path"], _known(row)) for row in context.summaries["export"]["artifacts"]]
    student = hf_candidate(_student_path(context), run_folder, "student")
    teacher = hf_candidate(context.teacher, run_folder, "teacher")
    return measure_and_gate(session, teacher, student, exported)


def _student_path(context: StageContext) -> Path:
    delivered = context.out.parent / "artifacts" / "hf"
    return delivered if delivered.is_dir() else context.inputs["distill"] / "model"


def _known(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in ("format", "runtime", "path", "quantization", "bytes", "bits_per_weight")}


def hf_candidate(path: Path, run_folder: Path, role: str) -> Candidate:
    """The teacher or the student as transformers runs it."""
    inside = path.is_relative_to(run_folder)
    shown = path.relative_to(run_folder).as_posix() if inside else path.name
    fields = {"format": HF.format, "runtime": HF.runtime, "path": shown, "bytes": weight_bytes(path)}
    return Candidate(path, fields, role)


def measure_and_gate(
    session: Session, teacher: Candidate, student: Candidate | None, others: Sequence[Candidate]
) -> dict[str, Any]:
    """Quality first, one model at a time; then speed, with nothing else in this process; then the gates."""
    wanted = [*others, *([student] if student else [])]
    qualities = judge_all(session, teacher, student, others)
    if student:
        qualities = [*qualities[1:], qualities[0]]
    cells = measure_all(session, [*wanted, teacher])
    artifacts = [assemble(*parts) for parts in zip(wanted, qualities, cells[:-1], strict=True)]
    baseline = assemble(teacher, _teacher_quality(qualities), cells[-1])
    return conclude(session, artifacts, baseline, with_student=student is not None)


def _teacher_quality(qualities: Sequence[Quality]) -> Quality:
    known = next((quality for quality in qualities if quality.teacher_perplexity is not None), None)
    perplexity, n_tokens = (known.teacher_perplexity, known.n_tokens) if known else (None, 0)
    return Quality(
        perplexity=perplexity,
        teacher_perplexity=perplexity,
        n_tokens=n_tokens,
        reason=IS_TEACHER,
        student_reason=IS_TEACHER,
    )


def conclude(session: Session, artifacts: list[Artifact], baseline: Artifact, with_student: bool) -> dict[str, Any]:
    """Apply the gates, write results.json, return the summary."""
    gates, exported = session.config.target.gates, any(artifact.format != "hf" for artifact in artifacts)
    without = [
        *(["decode_tokens_per_s"] if not gates.host_speed else []),
        *(["kl_to_student_nats"] if not with_student or not exported else []),  # the student alone is its own reference
    ]
    results = apply_gates(gates, artifacts, baseline.bytes, without)
    outcome, reasons = verdict(results, artifacts)
    summary = {
        "artifacts": [artifact.model_dump(mode="json") for artifact in artifacts],
        "baseline": baseline.model_dump(mode="json"),
        "gates": [gate.model_dump(mode="json") for gate in results],
        "verdict": outcome,
        "reasons": reasons,
        "notes": _notes(session, artifacts, without),
        "machine": host.machine_facts(),
        "versions": host.versions(),
    }
    write_json_atomic(session.out / "results.json", summary)
    return summary


def _notes(session: Session, artifacts: Sequence[Artifact], without: Sequence[str]) -> list[str]:
    target = session.config.target
    notes = [f"{a.path}: {note}" for a in artifacts for note in a.device.get("notes", [])]
    if session.kv_cache != "f16" and any(artifact.format == "gguf" for artifact in artifacts):
        notes.append(f"GGUF files were judged and timed with a {session.kv_cache} KV cache and flash attention")
    if not target.gates.host_speed:
        notes.append(
            f"speed and memory were measured on this host, not on the target '{target.name}', and are not gated"
        )
    tokens = session.rows_NS.size
    if tokens + session.rows_NS.shape[1] <= session.settings.tokens:
        notes.append(f"the held-out text has only {tokens} tokens, {session.settings.tokens} were asked for")
    if "kl_to_student_nats" in without and target.gates.kl_to_student_nats is not None:
        notes.append("the gate kl_to_student_nats was left out: no HF student is known for this artifact")
    return notes


def validate_artifact(path: Path, teacher: Path, config: BuildConfig, out: Path | None = None) -> dict[str, Any]:
    """`moe-edge validate ARTIFACT --teacher T`: one file or folder against its teacher.

    Args:
        path: a GGUF file, an ONNX folder, or a Hugging Face folder.
        teacher: the teacher's folder.
        config: gates, shape and text come from here.
        out: where cells, raw samples and results.json stay; None = nowhere.

    Raises:
        ConfigError: nothing lies at `path`, or the device's address is wrong.
        InputRejected: `path` is no model, or its vocabulary differs from the teacher's.
        DeviceProblem: the device is remote.
    """
    transport = open_transport(config.validate_.device)
    candidate = plain_candidate(path)
    with _folder(out) as folder:
        session = Session(
            config, held_out(config, teacher), folder, transport, strict=True, kv_cache=wished_cache(config)
        )
        with session.open(candidate):
            pass  # a file that does not open is the user's error here, with its own exit code, and not a failed cell
        return measure_and_gate(session, hf_candidate(teacher, folder, "teacher"), None, [candidate])


def _folder(out: Path | None) -> AbstractContextManager[Path]:
    """The folder asked for, or one that vanishes."""
    return nullcontext(out) if out else _vanishing()


@contextmanager
def _vanishing() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="moe-edge-") as name:
        yield Path(name)


def plain_candidate(path: Path) -> Candidate:
    """A candidate about which only its content is known."""
    kind = detect(path)
    fields = {"format": kind.format, "runtime": kind.runtime, "path": path.name, "bytes": weight_bytes(path)}
    return Candidate(path, fields)


def bench_artifact(path: Path, config: BuildConfig, out: Path | None = None) -> dict[str, Any]:
    """`moe-edge bench ARTIFACT --device local`: speed and memory only.

    Raises:
        ConfigError, InputRejected, DeviceProblem: as validate_artifact.
        ResourceProblem: memory ran out; every failure raises, there is no row of zeros.
    """
    transport = open_transport(config.validate_.device)
    candidate = plain_candidate(path)
    with _folder(out) as folder:
        session = Session(config, EMPTY_ROWS, folder, transport, reuse=False, kv_cache=wished_cache(config))
        cell = measure_all(session, [candidate])[0]
        if cell.failure:
            what = "the artifact could not be measured"
            raise FAILURE_ERRORS[cell.failure](what, where=str(path), why=cell.speed.reason)
        result = {**candidate.fields, **cell.model_dump(mode="json", exclude={"failure"})}
        write_json_atomic(folder / "results.json", result)
    return result
