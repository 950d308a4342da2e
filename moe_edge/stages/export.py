"""export: the student as GGUF and ONNX, each reopened in its runtime and compared with the student before it counts.

Writes reference/ (the full-precision files that parity is judged on), gguf/ and onnx/ (what is delivered) and parity.json.
Every file is written beside and renamed, so that a killed export goes on after the last finished file.
"""

from dataclasses import replace
from pathlib import Path

from moe_edge.compression.importance import student_imatrix
from moe_edge.contracts.artifacts import (
    CompressFolder,
    DistillFolder,
    ExportedArtifact,
    ExportSummary,
    PlanFolder,
    ProfileFolder,
)
from moe_edge.contracts.checkpoint import Checkpoint, CheckpointHeaders, Teacher
from moe_edge.contracts.config import BuildConfig
from moe_edge.exporting.gguf_files import export_gguf_files
from moe_edge.exporting.gguf_tokenizer import gguf_vocabulary
from moe_edge.exporting.golden import from_cache
from moe_edge.exporting.imatrix import dense_imatrix
from moe_edge.exporting.job import ExportedFile, ExportJob, formats_to_write, size_name
from moe_edge.exporting.onnx_files import export_onnx_files
from moe_edge.exporting.parity_judge import judge_files
from moe_edge.exporting.parity_rows import prompt_ids
from moe_edge.families import student_family
from moe_edge.models.loading import load_tokenizer
from moe_edge.models.students import count_params
from moe_edge.planning.estimate import Packing, file_bytes
from moe_edge.planning.headers import model_headers
from moe_edge.planning.options import file_limit
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.files import model_name
from moe_edge.storage.statistics import Statistics

FORMATS = {"gguf": export_gguf_files, "onnx": export_onnx_files}  # in the order of the report's rows


def run(
    config: BuildConfig,
    teacher: Teacher,
    out: Path,
    *,
    profile: ProfileFolder,
    plan: PlanFolder,
    compress: CompressFolder,
    distill: DistillFolder,
) -> ExportSummary:
    """Export the student of a build."""
    chosen, headers = plan.plan, inspect_checkpoint(distill.model)
    statistics = Statistics.load(profile.statistics)
    spec = student_family(headers.config).spec(headers.config)
    kept_experts = chosen.kept if chosen.prunes else None
    imatrix, kept = student_imatrix(statistics.imatrix, kept_experts, compress.path, spec)
    if chosen.action == "dense":
        imatrix, kept = dense_imatrix(imatrix, spec, kept), None
    job = plan_job(
        config,
        distill.model,
        out,
        main=chosen.quantization,
        precision=chosen.onnx_precision,
        statistics=replace(statistics, imatrix=imatrix),
        kept=None if kept is None else chosen.kept,
        provenance={"teacher_digest": teacher.digest, "method": f"{chosen.action} by {chosen.criterion}"},
        mix=chosen.quantization_by_class,
        limit_bytes=file_limit(config.target.budget, model_headers(teacher.headers)),
    )
    return export_model(replace(job, prompts=from_cache(profile.logits, profile.rows)))


def plain_job(config: BuildConfig, model: Teacher, out: Path, profile: ProfileFolder | None) -> ExportJob:
    """What to make of a checkpoint that no build made; a profile of it lends its importance matrix."""
    types = config.target.quantization
    return plan_job(
        config,
        model.path,
        out,
        main=types.gguf[0],
        precision=types.onnx,
        statistics=Statistics.load(profile.statistics) if profile else None,
        kept=None,
        provenance={"base_digest": model.digest, "method": "plain export"},
        limit_bytes=config.target.budget.weights,  # a share has no teacher here
    )


def refuse_tokenizer(config: BuildConfig, teacher: Checkpoint) -> None:
    """Refuse before any work a tokenizer, which the student shares with its teacher, that no exported file could hold.

    Raises:
        InputRejected: its chat template is broken or hostile, or GGUF, which is to be written, cannot represent it.
    """
    prompt_ids(load_tokenizer(teacher.path))
    formats = config.target.formats if config.export.formats == "auto" else config.export.formats
    if "gguf" in formats:
        gguf_vocabulary(teacher.path, teacher.spec.vocab, config.export.gguf.pre_tokenizer)


def plan_job(
    config: BuildConfig,
    model: Path,
    out: Path,
    *,
    main: str,
    precision: str,
    statistics: Statistics | None,
    kept: dict[int, list[int]] | None,
    provenance: dict[str, str],
    mix: dict[str, str] | None = None,
    limit_bytes: int | None = None,
) -> ExportJob:
    """Read the model's headers and settle names, formats and types; nothing is written.

    Args:
        limit_bytes: the budget of a file; the target's further types above it are left out.

    Raises:
        InputRejected: among others, the tokenizer's chat template is broken or hostile.
    """
    headers = inspect_checkpoint(model)
    prompt_ids(load_tokenizer(model))
    family = student_family(headers.config)
    spec = family.spec(headers.config)
    counts = count_params(spec, family.tensors(headers.config, headers.tensors))
    formats, notes = formats_to_write(config, spec)
    types = config.export.gguf.types
    recipes = list(types)
    if types == "auto":
        recipes = [main, *_others_that_fit(config, headers, main, limit_bytes)] if "gguf" in formats else []
    calibration = {"calibration_digest": str(statistics.meta.get("calibration_digest"))} if statistics else {}
    name = model_name(config.teacher.path)
    return ExportJob(
        model=model,
        out=out,
        name=f"{name}-{size_name(spec)}",
        spec=spec,
        params_total=counts.total,
        formats=formats,
        recipes=tuple(recipes),
        precision=precision if config.export.onnx.precision == "auto" else config.export.onnx.precision,
        config=config,
        statistics=statistics,
        kept=kept,
        provenance={"base_model": name} | calibration | provenance,
        mix=mix or {},
        notes=notes,
    )


def _others_that_fit(config: BuildConfig, headers: CheckpointHeaders, main: str, limit: int | None) -> list[str]:
    """The target's further recipes whose files meet the budget of bytes."""
    others = [recipe for recipe in config.target.quantization.gguf if recipe != main]
    if limit is None:
        return others
    model = model_headers(headers)
    return [recipe for recipe in others if file_bytes(model, model.spec.moe.experts, Packing("gguf", recipe)) <= limit]


def export_model(job: ExportJob) -> ExportSummary:
    """Write, reopen and compare every file of the job."""
    artifacts, files, notes = list[ExportedArtifact](), list[ExportedFile](), list(job.notes)
    for name, write in FORMATS.items():
        if name in job.formats:
            written = write(job)
            artifacts += written.artifacts
            files += written.files
            notes += written.notes
    return ExportSummary(
        name=job.name,
        artifacts=artifacts,
        parity=judge_files(job, files),
        notes=notes,
        imatrix=job.statistics is not None,
    )
