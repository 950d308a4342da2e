"""Quality and speed of one model each, kept in files (cells) so that a killed validation goes on.

A cell's file is named by a hash of everything it depends on; limits are no part of it. Failures are returned but never kept.
Reference logits of teacher and student are computed once, only when a quality is missing, and one model is in memory at a time.

Shape suffixes: N rows of held-out text, S tokens of a row, V vocabulary.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from moe_edge.contracts.config import BuildConfig, ValidateConfig
from moe_edge.contracts.errors import ResourceProblem
from moe_edge.contracts.manifest import canonical_sha256, content_digest
from moe_edge.contracts.measurements import Artifact, Memory, Quality, Speed
from moe_edge.devices import harness
from moe_edge.devices.detect import Kind
from moe_edge.devices.transport import Transport
from moe_edge.metrics.quality import Score
from moe_edge.metrics.reference import judge_runtime, judge_spilled, spill_logits
from moe_edge.process import host
from moe_edge.process.progress import track
from moe_edge.runtimes import open_runtime
from moe_edge.runtimes.base import Runtime
from moe_edge.runtimes.gguf_header import parts_of
from moe_edge.runtimes.hf_streamed import StreamedStudent
from moe_edge.storage.files import sha256_file, write_text_atomic
from moe_edge.storage.folders import hash_folder

log = logging.getLogger(__name__)

CELLS_SCHEMA = "moe-edge/cells@1"
HF_REPETITIONS = 3  # transformers on a CPU is a baseline, not a product: fewer runs, and the report says how many
IS_STUDENT = "this is the HF student, the reference itself"
NO_STUDENT = "no HF student is known for this artifact"
NOT_REPACKED = (
    "timed without the weights that llama.cpp rearranges for speed, because those for AMX kill the process in this build of "
    "llama.cpp: a build without AMX is faster, and speeds of the two do not compare"
)


@dataclass(frozen=True)
class ModelToMeasure:
    """A model where it lies, and what is known of it before it is opened."""

    location: Path
    kind: Kind
    shown: str  # its path in results and messages
    bytes: int  # of its weight files
    quantization: str | None = None
    bits_per_weight: float | None = None
    role: Literal["teacher", "student", "artifact"] = "artifact"


def model_digest(location: Path) -> str:
    """sha256 over the content of a GGUF file with all its parts, or of a folder."""
    if location.is_file():
        parts = [sha256_file(part) for part in parts_of(location)]
        return parts[0] if len(parts) == 1 else canonical_sha256(parts)
    return content_digest(hash_folder(location))


@dataclass(frozen=True)
class Session:
    """What all cells of one validation share."""

    config: BuildConfig
    rows_NS: np.ndarray  # held-out token ids
    out: Path
    transport: Transport
    opener: Callable[..., Runtime] = open_runtime
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

    def digest(self, model: ModelToMeasure) -> str:
        """`model_digest`, computed once."""
        if model.location not in self.digests:
            self.digests[model.location] = model_digest(model.location)
        return self.digests[model.location]

    def cell(self, kind: str, *parts: Any) -> Path:
        """The file of a cell that depends on `parts`."""
        key = canonical_sha256([CELLS_SCHEMA, kind, *parts]).removeprefix("sha256:")
        return self.out / "cells" / f"{kind}-{key}.json"

    def options(self, model: ModelToMeasure) -> dict[str, str]:
        """What its runtime is told beyond its defaults."""
        is_gguf = model.kind.runtime == "llama_cpp"
        return {"kv_cache": self.kv_cache} if is_gguf and self.kv_cache != "f16" else {}

    def open(self, model: ModelToMeasure) -> Runtime:
        """The model in its runtime, long enough for a row."""
        context_length = self.rows_NS.shape[1]
        options = self.options(model)
        return self.opener(
            model.kind.runtime, model.location, threads=self.threads, context_length=context_length, **options
        )


class SpeedCell(BaseModel):
    """Speed, memory and device of one model."""

    model_config = ConfigDict(extra="forbid")
    speed: Speed
    memory: Memory
    device: dict[str, Any]
    failure: harness.FailureKind | None = None


def to_artifact(model: ModelToMeasure, quality: Quality, cell: SpeedCell) -> Artifact:
    """The row of a model in results and reports."""
    return Artifact(
        format=model.kind.format,
        runtime=model.kind.runtime,
        quantization=model.quantization,
        path=model.shown,
        bytes=model.bytes,
        bits_per_weight=model.bits_per_weight,
        quality=quality,
        speed=cell.speed,
        memory=cell.memory,
        device=cell.device,
    )


def measure_quality(
    session: Session, teacher: ModelToMeasure, student: ModelToMeasure | None, others: Sequence[ModelToMeasure]
) -> list[Quality]:
    """Quality of [student, *others] (without a student: of the others) against the teacher and the student."""
    wanted = [*([student] if student else []), *others]
    references = [session.digest(teacher), session.digest(student) if student else None]
    rows_digest = canonical_sha256(session.rows_NS.tolist())
    cells = {
        one.location: session.cell(
            "quality", references, rows_digest, session.digest(one), *session.options(one).values()
        )
        for one in wanted
    }
    missing = [one for one in wanted if not cells[one.location].exists()]
    fresh = _missing_qualities(session, teacher, student, missing, cells) if missing else {}
    return [fresh.get(one.location) or Quality.model_validate_json(cells[one.location].read_bytes()) for one in wanted]


def _missing_qualities(
    session: Session,
    teacher: ModelToMeasure,
    student: ModelToMeasure | None,
    missing: Sequence[ModelToMeasure],
    cells: dict[Path, Path],
) -> dict[Path, Quality]:
    """Measure what no cell has yet; the reference logits live in scratch/ meanwhile."""
    scratch = session.out / "scratch"
    found: dict[Path, Quality] = {}
    try:
        references = {"teacher": _reference_logits(session, teacher, scratch)}
        if student:
            references["student"] = _reference_logits(session, student, scratch)
        for model in missing:
            found[model.location] = quality = _quality_of(session, model, references)
            if quality.kl_nats is not None:
                _keep(cells[model.location], quality)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def _keep(path: Path, cell: BaseModel) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, cell.model_dump_json() + "\n")


def _reference_logits(session: Session, model: ModelToMeasure, scratch: Path) -> np.ndarray:
    """Logits [N, S, V] of the teacher or the student, on disk."""
    with _open_reference(session, model) as runtime:
        return spill_logits(runtime, session.rows_NS, scratch / f"{model.role}.f32", f"{model.role} logits")


def _open_reference(session: Session, model: ModelToMeasure) -> Runtime | StreamedStudent:
    """As `session.open`; a checkpoint that does not fit into memory has read all rows layer by layer."""
    try:
        return session.open(model)
    except ResourceProblem as problem:
        if model.kind.runtime != "hf":
            raise
        log.warning("%s: it is read layer by layer", problem.why)
    student = StreamedStudent(model.location, session.threads, session.rows_NS.shape[1])
    student.routing_gaps(list(session.rows_NS))
    return student


def _quality_of(session: Session, model: ModelToMeasure, references: dict[str, np.ndarray]) -> Quality:
    """One model's quality; whatever breaks in its runtime is this cell's failure and no other's."""
    if model.role == "student":
        score = judge_spilled(references["student"], session.rows_NS, references["teacher"])
        return _to_quality(score, None, IS_STUDENT)
    try:
        with session.open(model) as runtime:
            scores = judge_runtime(runtime, session.rows_NS, references, f"judging {model.location.name}")
    except Exception as error:
        if session.strict:
            raise
        log.exception("%s could not be judged", model.shown)
        reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        return Quality(reason=reason, student_reason=reason)
    return _to_quality(scores["teacher"], scores.get("student"), NO_STUDENT)


def _to_quality(teacher: Score, student: Score | None, no_student: str) -> Quality:
    """Two scores as the report's quality."""
    return Quality(
        kl_nats=teacher.kl_nats,
        kl_nats_ci95=teacher.kl_nats_ci95,
        top1_agreement=teacher.top1_agreement,
        perplexity=teacher.perplexity,
        teacher_perplexity=teacher.reference_perplexity,
        n_tokens=teacher.n_tokens,
        reason=teacher.reason,
        kl_to_student_nats=student.kl_nats if student else None,
        kl_to_student_nats_ci95=student.kl_nats_ci95 if student else None,
        top1_agreement_to_student=student.top1_agreement if student else None,
        student_reason=student.reason if student else no_student,
    )


def measure_speed(session: Session, models: Sequence[ModelToMeasure]) -> list[SpeedCell]:
    """Speed and memory of each model, one fresh process after another in this order."""
    return [_speed_of(session, model) for model in track(models, "measuring speed", total=len(models))]


def _speed_of(session: Session, model: ModelToMeasure) -> SpeedCell:
    job = _job(session, model)
    machine = host.machine_facts()
    shape = [job.prompt_tokens, job.new_tokens, job.repetitions]
    cell = session.cell("speed", session.digest(model), shape, job.threads, machine, *job.options.values())
    if session.reuse and cell.exists():
        return SpeedCell.model_validate_json(cell.read_bytes())
    load = host.load_facts()
    outcome = harness.measure(session.transport, job, worker=session.worker)
    cache = {"kv_cache": session.kv_cache} if model.kind.runtime == "llama_cpp" else {}
    not_repacked = isinstance(outcome, harness.Samples) and outcome.repacks is False
    notes = [*load["notes"], *([NOT_REPACKED] if not_repacked else [])]
    measured = SpeedCell(
        speed=harness.to_speed(outcome, job.prompt_tokens),
        memory=harness.to_memory(outcome),
        device={
            "address": session.transport.address,
            "threads": job.threads,
            **cache,
            **machine,
            **load,
            "notes": notes,
        },
        failure=outcome.kind if isinstance(outcome, harness.Failure) else None,
    )
    if isinstance(outcome, harness.Failure):
        log.error("%s could not be measured: %s", model.shown, outcome)
        return measured
    harness.save_samples(outcome, session.out / "raw" / f"{cell.stem}.json")
    _keep(cell, measured)
    return measured


def _job(session: Session, model: ModelToMeasure) -> harness.BenchJob:
    settings, runtime = session.settings, model.kind.runtime
    prompt = np.resize(session.rows_NS.reshape(-1), settings.prompt_tokens).tolist() if session.rows_NS.size else None
    return harness.BenchJob(
        runtime=runtime,
        path=str(model.location.resolve()),
        threads=session.threads,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        repetitions=min(settings.repetitions, HF_REPETITIONS) if runtime == "hf" else settings.repetitions,
        prompt_ids=prompt,
        options=session.options(model),
    )
