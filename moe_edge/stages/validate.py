"""validate: what the exported files, the student and the teacher really do, measured on the files before they are delivered.

Writes results.json, cells/ (one file per measured model, which a rerun reuses) and raw/ (every timestamp). The target's limits
are applied when the report is written, so that a changed limit measures nothing again.
"""

from pathlib import Path

from moe_edge.contracts.artifacts import DistillFolder, ExportFolder, PlanFolder, ProfileFolder, ValidationSummary
from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.config import BuildConfig
from moe_edge.devices.detect import Kind
from moe_edge.devices.transport import open_transport
from moe_edge.evaluation.cells import ModelToMeasure, Session
from moe_edge.evaluation.validation import RESULTS_NAME, held_out_rows, measure, transformers_model
from moe_edge.storage.files import write_json_atomic

DELIVERED_STUDENT = "artifacts/hf"


def run(
    config: BuildConfig,
    teacher: Teacher,
    out: Path,
    *,
    profile: ProfileFolder,
    plan: PlanFolder,
    distill: DistillFolder,
    export: ExportFolder,
) -> ValidationSummary:
    """Measure every artifact of a build under the paths of its delivery, GGUF files in the planned precision of the KV cache.

    Raises:
        ConfigError: the device's address is wrong, or the held-out text is short or part of the calibration text.
        DeviceProblem: the device is remote.
    """
    transport = open_transport(config.validate_.device)
    rows_NS = held_out_rows(config, teacher.path, profile)
    session = Session(config, rows_NS, out, transport, kv_cache=plan.plan.estimate.kv_precision)
    reference = transformers_model(teacher.path, "teacher", teacher.name)
    student = transformers_model(distill.model, "student", DELIVERED_STUDENT)
    summary = measure(session, reference, student, exported_models(export))
    write_json_atomic(out / RESULTS_NAME, summary.model_dump(mode="json"))
    return summary


def exported_models(export: ExportFolder) -> list[ModelToMeasure]:
    """The exported files, as the export knows them."""
    return [
        ModelToMeasure(
            export.location(row.path),
            Kind(row.format, row.runtime),
            row.path,
            row.bytes,
            row.quantization,
            row.bits_per_weight,
        )
        for row in export.summary.artifacts
    ]
