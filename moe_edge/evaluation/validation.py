"""What models really do, from their own outputs: of a build, or of a single artifact.

Quality of every artifact against the teacher and the HF student on held-out text comes first, one model at a time; then speed
and memory in fresh processes, with nothing else in this one. Limits are applied to what was measured in judgement.py.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from moe_edge.contracts.artifacts import ProfileFolder, ValidationSummary
from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.measurements import Artifact, Memory, Quality, Speed
from moe_edge.contracts.report import Judgement
from moe_edge.devices.detect import HF, detect, weight_bytes
from moe_edge.devices.harness import FAILURE_ERRORS
from moe_edge.devices.transport import open_transport
from moe_edge.evaluation.cells import ModelToMeasure, Session, measure_quality, measure_speed, to_artifact
from moe_edge.evaluation.judgement import device_label, judge
from moe_edge.models.loading import load_tokenizer
from moe_edge.process import host
from moe_edge.storage.files import write_json_atomic
from moe_edge.storage.rows import TokenRows
from moe_edge.texts.rows import heldout_rows

IS_TEACHER = "this is the teacher, the reference itself"
RESULTS_NAME = "results.json"
EMPTY_ROWS = np.zeros((0, 0), dtype=np.int64)


class BenchedArtifact(BaseModel):
    """Speed and memory of a single artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["gguf", "onnx", "hf"]
    runtime: Literal["llama_cpp", "ort", "hf"]
    path: str
    bytes: int
    speed: Speed
    memory: Memory
    device: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """results.json as plain data."""
        return self.model_dump(mode="json")


def measure(
    session: Session, teacher: ModelToMeasure, student: ModelToMeasure | None, others: Sequence[ModelToMeasure]
) -> ValidationSummary:
    """Quality, speed and memory of the others, the student and the teacher."""
    qualities = measure_quality(session, teacher, student, others)
    if student:
        qualities = [*qualities[1:], qualities[0]]
    wanted = [*others, *([student] if student else [])]
    *cells, teacher_cell = measure_speed(session, [*wanted, teacher])
    artifacts = [to_artifact(*parts) for parts in zip(wanted, qualities, cells, strict=True)]
    return ValidationSummary(
        artifacts=artifacts,
        baseline=to_artifact(teacher, _teacher_quality(qualities), teacher_cell),
        with_student=student is not None,
        notes=_notes(session, artifacts),
        machine=host.machine_facts(),
        versions=host.versions(),
    )


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


def _notes(session: Session, artifacts: Sequence[Artifact]) -> list[str]:
    notes = [f"{one.path}: {note}" for one in artifacts for note in one.device.get("notes", [])]
    if session.kv_cache != "f16" and any(artifact.format == "gguf" for artifact in artifacts):
        notes.append(f"GGUF files were judged and timed with a {session.kv_cache} KV cache and flash attention")
    tokens = session.rows_NS.size
    if tokens + session.rows_NS.shape[1] <= session.settings.tokens:
        notes.append(f"the held-out text has only {tokens} tokens, {session.settings.tokens} were asked for")
    return notes


def held_out_rows(config: BuildConfig, teacher: Path, profile: ProfileFolder | None = None) -> np.ndarray:
    """Token ids [N, S] of the held-out text in the teacher's tokenizer; none of it may occur in the profile's rows."""
    settings, length = config.validate_, config.calibration.sequence_length
    seen = TokenRows.load(profile.rows) if profile else None
    return heldout_rows(settings.text, load_tokenizer(teacher), settings.tokens, length, seen).ids_NS


def transformers_model(location: Path, role: Literal["teacher", "student"], shown: str) -> ModelToMeasure:
    """The teacher or the student as transformers runs it."""
    return ModelToMeasure(location, HF, shown, weight_bytes(location), role=role)


def lone_model(location: Path) -> ModelToMeasure:
    """An artifact of which only its content is known.

    Raises:
        ConfigError: nothing is there.
        InputRejected: it is no model.
    """
    return ModelToMeasure(location, detect(location), location.name, weight_bytes(location))


def validate_artifact(path: Path, teacher: Teacher, config: BuildConfig, out: Path | None = None) -> Judgement:
    """One file or folder against its teacher, under the limits of the configuration's target.

    Args:
        path: a GGUF file, an ONNX folder, or a Hugging Face folder.
        teacher: what it is compared with.
        config: limits, shape and text come from here.
        out: where cells, raw samples and results.json stay; None = nowhere.

    Raises:
        ConfigError: nothing lies at `path`, or the device's address is wrong.
        InputRejected: `path` is no model, or its vocabulary differs from the teacher's.
        DeviceProblem: the device is remote.
    """
    transport = open_transport(config.validate_.device)
    model = lone_model(path)
    reference = transformers_model(teacher.path, "teacher", teacher.name)
    with _folder(out) as folder:
        rows_NS = held_out_rows(config, teacher.path)
        session = Session(config, rows_NS, folder, transport, strict=True, kv_cache=_wished_cache(config))
        with session.open(model):
            pass  # a file that does not open is the user's error here, with its own exit code, and not a failed cell
        judgement = judge(measure(session, reference, None, [model]), config.target)
        write_json_atomic(folder / RESULTS_NAME, judgement.to_dict())
    return judgement


def bench_artifact(path: Path, config: BuildConfig, out: Path | None = None) -> BenchedArtifact:
    """Speed and memory of one file or folder; every failure raises, there is no row of zeros.

    Args:
        path: as of `validate_artifact`.
        config: shape and runtime options come from here.
        out: where raw samples and results.json stay; None = nowhere.

    Raises:
        ConfigError, InputRejected, DeviceProblem: as `validate_artifact`.
        ResourceProblem: memory ran out.
    """
    transport = open_transport(config.validate_.device)
    model = lone_model(path)
    with _folder(out) as folder:
        session = Session(config, EMPTY_ROWS, folder, transport, reuse=False, kv_cache=_wished_cache(config))
        cell = measure_speed(session, [model])[0]
        if cell.failure:
            what = "the artifact could not be measured"
            raise FAILURE_ERRORS[cell.failure](what, where=str(path), why=cell.speed.reason)
        result = BenchedArtifact(
            format=model.kind.format,
            runtime=model.kind.runtime,
            path=model.shown,
            bytes=model.bytes,
            speed=cell.speed,
            memory=cell.memory,
            device=cell.device | {"label": device_label(config.target.gates)},
        )
        write_json_atomic(folder / RESULTS_NAME, result.to_dict())
    return result


def _wished_cache(config: BuildConfig) -> str:
    """The precision of the KV cache where there is no plan: the target's; auto is float16."""
    asked = config.target.runtime.kv_cache
    return "f16" if asked == "auto" else asked


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """The folder asked for, or one that vanishes."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="moe-edge-") as name:
        yield Path(name)
