"""The cells of a validation: the quality and the speed of one model each, kept in files so that a killed run goes on.

A cell's file is named by a hash of everything it depends on. Failures are returned but never kept. Reference logits of
teacher and student are computed once, only when a quality is missing, and one model is in memory at a time.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from moe_edge.contracts.config import BuildConfig, ValidateConfig
from moe_edge.contracts.errors import ResourceProblem
from moe_edge.contracts.manifest import canonical_sha256, content_digest
from moe_edge.contracts.report import Artifact, Memory, Quality, Speed
from moe_edge.devices import harness
from moe_edge.devices.transport import Transport
from moe_edge.metrics.quality import Score
from moe_edge.metrics.reference import judge_runtime, judge_spilled, spill_logits
from moe_edge.process import host
from moe_edge.process.progress import track
from moe_edge.runtimes import open_runtime
from moe_edge.runtimes.gguf_header import parts_of
from moe_edge.runtimes.hf_streamed import StreamedStudent
from moe_edge.storage.files import sha256_file, write_text_atomic
from moe_edge.storage.folders import hash_folder

log = logging.getLogger(__name__)

CELLS_SCHEMA = "moe-edge/cells@1"
HF_REPETITIONS = 3  # transformers on a CPU is a baseline, not a product: fewer runs, and the report says how many
IS_TEACHER = "this is the teacher, the reference itself"
IS_STUDENT = "this is the HF student, the reference itself"
NO_STUDENT = "no HF student is known for this artifact"


@dataclass(frozen=True)
class Candidate:
    """One model to measure and what is known of it."""

    location: Path
    fields: dict[str, Any]  # format, runtime, quantization, path, bytes, bits_per_weight of contracts.report.Artifact
    role: str = "artifact"  # teacher | student | artifact

    @property
    def digest(self) -> str:
        """sha256 over the model's content."""
        if self.location.is_file():
            parts = [sha256_file(part) for part in parts_of(self.location)]
            return parts[0] if len(parts) == 1 else canonical_sha256(parts)
        return content_digest(hash_folder(self.location))


@dataclass(frozen=True)
class Session:
    """What all cells of one validation share."""

    config: BuildConfig
    rows_NS: np.ndarray  # held-out token ids
    out: Path
    transport: Transport
    opener: Callable[..., Any] = open_runtime
    worker: Sequence[str] = harness.WORKER
    strict: bool = False  # raise a model's own error instead of noting a failed cell (a single artifact)
    reuse: bool = True  # take cells that an earlier run finished
    kv_cache: str = "f16"  # precision of the KV cache of GGUF files, as planned
    digests: dict[Path, str] = field(default_factory=dict)

    @property
    def settings(self) -> ValidateConfig:
        return self.config.validate_

    @property
    def threads(self) -> int:
        return host.threads_for(self.config.target.runtime.threads)

    def digest(self, candidate: Candidate) -> str:
        if candidate.location not in self.digests:
            self.digests[candidate.location] = candidate.digest
        return self.digests[candidate.location]

    def cell(self, kind: str, *parts: Any) -> Path:
        """The file of a cell that depends on `parts`."""
        key = canonical_sha256([CELLS_SCHEMA, kind, *parts]).removeprefix("sha256:")
        return self.out / "cells" / f"{kind}-{key}.json"

    def options(self, candidate: Candidate) -> dict[str, str]:
        """What its runtime is told beyond its defaults."""
        is_gguf = candidate.fields["runtime"] == "llama_cpp"
        return {"kv_cache": self.kv_cache} if is_gguf and self.kv_cache != "f16" else {}

    def open(self, candidate: Candidate) -> Any:
        """The candidate in its runtime, long enough for a row."""
        return self.opener(
            candidate.fields["runtime"], candidate.location, threads=self.threads,
            context_length=self.rows_NS.shape[1], **self.options(candidate),
        )  # fmt: skip


class SpeedCell(BaseModel):
    """Speed, memory and device of one model."""

    model_config = ConfigDict(extra="forbid")
    speed: Speed
    memory: Memory
    device: dict[str, Any]
    failure: harness.FailureKind | None = None


def judge_all(
    session: Session, teacher: Candidate, student: Candidate | None, others: Sequence[Candidate]
) -> list[Quality]:
    """Quality of [student, *others] (without a student: of the others) against the teacher and the student."""
    wanted = [*([student] if student else []), *others]
    references = [session.digest(teacher), session.digest(student) if student else None]
    rows_digest = canonical_sha256(session.rows_NS.tolist())
    cells = {
        c.location: session.cell("quality", references, rows_digest, session.digest(c), *session.options(c).values())
        for c in wanted
    }
    missing = [c for c in wanted if not cells[c.location].exists()]
    fresh = _judge_missing(session, teacher, student, missing, cells) if missing else {}
    return [
        fresh.get(c.location) or Quality.model_validate_json(cells[c.location].read_bytes()) for c in wanted
    ]  # fmt: skip


def _judge_missing(
    session: Session,
    teacher: Candidate,
    student: Candidate | None,
    missing: Sequence[Candidate],
    cells: dict[Path, Path],
) -> dict[Path, Quality]:
    """Judge what no cell has yet; the reference logits live in scratch/ meanwhile."""
    scratch = session.out / "scratch"
    judged: dict[Path, Quality] = {}
    try:
        references = {"teacher": _reference(session, teacher, scratch)}
        if student:
            references["student"] = _reference(session, student, scratch)
        for candidate in missing:
            judged[candidate.location] = quality = _judge(session, candidate, references)
            if quality.kl_nats is not None:
                _keep(cells[candidate.location], quality)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return judged


def _keep(path: Path, cell: BaseModel) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, cell.model_dump_json() + "\n")


def _reference(session: Session, candidate: Candidate, scratch: Path) -> np.ndarray:
    """Logits [N, S, V] of the teacher or the student, on disk."""
    with _open_reference(session, candidate) as runtime:
        return spill_logits(runtime, session.rows_NS, scratch / f"{candidate.role}.f32", f"{candidate.role} logits")


def _open_reference(session: Session, candidate: Candidate) -> Any:
    """As `session.open`; a checkpoint that does not fit into memory has read all rows layer by layer."""
    try:
        return session.open(candidate)
    except ResourceProblem as problem:
        if candidate.fields["runtime"] != "hf":
            raise
        log.warning("%s: it is read layer by layer", problem.why)
    student = StreamedStudent(candidate.location, session.threads, session.rows_NS.shape[1])
    student.routing_gaps(list(session.rows_NS))
    return student


def _judge(session: Session, candidate: Candidate, references: dict[str, np.ndarray]) -> Quality:
    """One candidate's quality; whatever breaks in its runtime is this cell's failure and no other's."""
    if candidate.role == "student":
        return to_quality(
            judge_spilled(references["student"], session.rows_NS, references["teacher"]), None, IS_STUDENT
        )
    try:
        with session.open(candidate) as runtime:
            scores = judge_runtime(runtime, session.rows_NS, references, f"judging {candidate.location.name}")
    except Exception as error:
        if session.strict:
            raise
        log.exception("%s could not be judged", candidate.fields["path"])
        reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        return Quality(reason=reason, student_reason=reason)
    return to_quality(scores["teacher"], scores.get("student"), NO_STUDENT)


def to_quality(teacher: Score, student: Score | None, no_student: str) -> Quality:
    """Two scores as the report's quality."""
    return Quality(
        kl_nats=teacher.kl_nats, kl_nats_ci95=teacher.kl_nats_ci95, top1_agreement=teacher.top1_agreement,
        perplexity=teacher.perplexity, teacher_perplexity=teacher.reference_perplexity, n_tokens=teacher.n_tokens,
        reason=teacher.reason,
        kl_to_student_nats=student.kl_nats if student else None,
        kl_to_student_nats_ci95=student.kl_nats_ci95 if student else None,
        top1_agreement_to_student=student.top1_agreement if student else None,
        student_reason=student.reason if student else no_student,
    )  # fmt: skip


def measure_all(session: Session, candidates: Sequence[Candidate]) -> list[SpeedCell]:
    """Speed and memory of each candidate, one fresh process after another in this order."""
    return [_measure(session, c) for c in track(candidates, "measuring speed", total=len(candidates))]


def _measure(session: Session, candidate: Candidate) -> SpeedCell:
    job = _job(session, candidate)
    machine = host.machine_facts()
    cell = session.cell(
        "speed", session.digest(candidate), [job.prompt_tokens, job.new_tokens, job.repetitions], job.threads, machine,
        *job.options.values(),
    )  # fmt: skip
    if session.reuse and cell.exists():
        return SpeedCell.model_validate_json(cell.read_bytes())
    before = host.load_facts()
    outcome = harness.measure(session.transport, job, worker=session.worker)
    label = "target" if session.config.target.gates.host_speed else "host"
    measured = SpeedCell(
        speed=harness.to_speed(outcome, job.prompt_tokens),
        memory=harness.to_memory(outcome),
        device={
            "address": session.transport.address,
            "label": label,
            "threads": job.threads,
            **_cache(session, candidate),
            **machine,
            **before,
        },  # fmt: skip
        failure=outcome.kind if isinstance(outcome, harness.Failure) else None,
    )
    if isinstance(outcome, harness.Failure):
        log.error("%s could not be measured: %s", candidate.fields["path"], outcome)
        return measured
    harness.save_samples(outcome, session.out / "raw" / f"{cell.stem}.json")
    _keep(cell, measured)
    return measured


def _cache(session: Session, candidate: Candidate) -> dict[str, str]:
    return {"kv_cache": session.kv_cache} if candidate.fields["runtime"] == "llama_cpp" else {}


def _job(session: Session, candidate: Candidate) -> harness.BenchJob:
    settings, runtime = session.settings, candidate.fields["runtime"]
    prompt = np.resize(session.rows_NS.reshape(-1), settings.prompt_tokens).tolist() if session.rows_NS.size else None
    repetitions = min(settings.repetitions, HF_REPETITIONS) if runtime == "hf" else settings.repetitions
    return harness.BenchJob(
        runtime,
        str(candidate.location.resolve()),
        session.threads,
        settings.prompt_tokens,
        settings.new_tokens,
        repetitions,
        prompt,
        session.options(candidate),
    )


def assemble(candidate: Candidate, quality: Quality, cell: SpeedCell) -> Artifact:
    """The report's row of a model."""
    return Artifact(**candidate.fields, quality=quality, speed=cell.speed, memory=cell.memory, device=cell.device)
