"""export: the student as GGUF and ONNX, each reopened in its runtime and compared with the student before it counts.

Writes reference/ (the full-precision files that parity is judged on), gguf/ and onnx/ (what is delivered) and parity.json.
Every file is written beside and renamed, so that a killed export goes on after the last finished file.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from moe_edge.compression.importance import student_imatrix
from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.capabilities import RUNTIME_OF_FORMAT, refusals, require_exportable
from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import InputRejected, ResourceProblem
from moe_edge.contracts.onnx_bits import LayerBits, Provider
from moe_edge.contracts.plan import Plan
from moe_edge.contracts.spec import ModelSpec
from moe_edge.export.bundles import GOLDEN
from moe_edge.export.gguf_files import export_gguf
from moe_edge.export.golden import from_cache
from moe_edge.export.imatrix import dense_imatrix
from moe_edge.export.job import Job, Reopened
from moe_edge.export.onnx import export_onnx
from moe_edge.export.onnx_audit import audit_onnx
from moe_edge.export.parity_judge import Judge, judge_exports
from moe_edge.export.parity_rows import prompt_ids
from moe_edge.families import student_family
from moe_edge.models.checkpoint_subsets import layers_within, write_first_layers
from moe_edge.models.loading import load_tokenizer
from moe_edge.models.students import count_params
from moe_edge.planning.estimate import Packing, file_bytes
from moe_edge.planning.headers import model_headers
from moe_edge.process.host import threads_for
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.files import write_json_atomic
from moe_edge.storage.statistics import Statistics

log = logging.getLogger(__name__)
FP32_MEMORY_SHARE = (
    0.4  # of the free memory: beyond it only the first layers are judged in float32, and the report says so
)


def run(context: StageContext) -> dict[str, Any]:
    """Export the distilled student of a build; returns {"artifacts": [...], "parity": [...]}."""
    plan = Plan.read(context.inputs["plan"] / "plan.json")
    model = context.inputs["distill"] / "model"
    statistics = Statistics.load(context.inputs["profile"] / "statistics.safetensors")
    spec = _spec_of(model)
    chosen = plan.kept if plan.prunes else None
    imatrix, kept = student_imatrix(statistics.imatrix, chosen, context.inputs["compress"], spec)
    if plan.action == "dense":
        imatrix, kept = dense_imatrix(imatrix, spec, kept), None
    job = plan_job(
        context.config, model, context.out,
        main=plan.quantization, precision=plan.onnx_precision,
        statistics=replace(statistics, imatrix=imatrix), kept=None if kept is None else plan.kept,
        provenance={"teacher_digest": context.teacher_digest, "method": f"{plan.action} by {plan.criterion}"},
        mix=plan.quantization_by_class,
    )  # fmt: skip
    profile = context.inputs["profile"]
    return export_model(replace(job, prompts=from_cache(profile / "logits.h5", profile / "rows.safetensors")))


def plan_job(
    config: BuildConfig, model: Path, out: Path, *, main: str, precision: str, statistics: Statistics | None,
    kept: dict[int, list[int]] | None, provenance: dict[str, str], mix: dict[str, str] | None = None,
) -> Job:  # fmt: skip
    """Read the model's headers and settle names, formats and types; nothing is written.

    Raises:
        InputRejected: among others, the tokenizer's chat template is broken or hostile.
    """
    headers = inspect_checkpoint(model)
    prompt_ids(load_tokenizer(model))
    family = student_family(headers.config)
    spec = family.spec(headers.config)
    counts = count_params(spec, family.tensors(headers.config, headers.tensors))
    formats, notes = _formats(config, spec)
    types = config.export.gguf.types
    recipes = list(types)
    if types == "auto":
        recipes = [main, *_others_that_fit(config, headers, main)] if "gguf" in formats else []
    onnx_precision = precision if config.export.onnx.precision == "auto" else config.export.onnx.precision
    name = f"{model_name(config)}-{_size_name(spec)}"
    calibration = {"calibration_digest": str(statistics.meta.get("calibration_digest"))} if statistics else {}
    provenance = {"base_model": model_name(config)} | calibration | provenance
    return Job(
        model, out, name, spec, counts.total, formats, tuple(recipes), onnx_precision, config, statistics, kept,
        provenance, mix or {}, notes,
    )  # fmt: skip


def _size_name(spec: ModelSpec) -> str:
    """'5e', '5e-uneven' (on average), or 'dense'."""
    counts = spec.moe.experts_per_layer
    if counts:
        return f"{round(sum(counts) / len(counts))}e-uneven"
    return f"{spec.moe.experts}e" if spec.moe_layers else "dense"


def _spec_of(model: Path) -> ModelSpec:
    config = inspect_checkpoint(model).config
    return student_family(config).spec(config)


def _formats(config: BuildConfig, spec: ModelSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The formats to write, and what is said about one of the target's that cannot hold a dense student.

    A mixture is refused as a plan refuses its teacher; a dense student, made of a teacher that passed, loses the format.
    """
    asked = config.target.formats if config.export.formats == "auto" else config.export.formats
    if spec.moe_layers:
        require_exportable(spec, asked)
        return tuple(asked), ()
    refused = {name: refusals(RUNTIME_OF_FORMAT[name], spec) for name in asked}
    possible = tuple(name for name in asked if not refused.get(name))
    told = tuple(f"{name} was left out: {'; '.join(reasons)}" for name, reasons in refused.items() if reasons)
    if told and (config.export.formats != "auto" or not possible):
        raise InputRejected("this dense student cannot be exported", where=f"a {spec.family} checkpoint", why=told[0])
    return possible, told


def _others_that_fit(config: BuildConfig, headers: CheckpointHeaders, main: str) -> list[str]:
    """The target's further recipes whose files meet the weights budget."""
    others = [recipe for recipe in config.target.quantization.gguf if recipe != main]
    limit = config.target.budget.weights
    if limit is None:
        return others
    model = model_headers(headers)
    return [recipe for recipe in others if file_bytes(model, model.spec.moe.experts, Packing("gguf", recipe)) <= limit]


def model_name(config: BuildConfig) -> str:
    """A file-name-safe name of the teacher."""
    source = config.teacher.path
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).name).strip("-.") if source else "demo-teacher"


def export_model(job: Job) -> dict[str, Any]:
    """Write, reopen and compare every file of the job."""
    artifacts: list[dict[str, Any]] = []
    reopened: list[Reopened] = []
    notes = list(job.notes)
    if "gguf" in job.formats:
        export_gguf(job, artifacts, reopened)
    if "onnx" in job.formats:
        _export_onnx(job, artifacts, reopened, notes)
    rows = _judge(job, reopened)
    return {
        "name": job.name,
        "artifacts": artifacts,
        "parity": rows,
        "notes": notes,
        "imatrix": job.statistics is not None,
    }


def _once(path: Path, write: Callable[[Path], Any]) -> Any:
    """Write `path` unless an earlier, killed run finished it (writers rename whole files into place)."""
    if path.exists():
        log.info("%s: already written", path.name)
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path)


def _export_onnx(job: Job, artifacts: list[dict[str, Any]], reopened: list[Reopened], notes: list[str]) -> None:
    options = job.config.export.onnx

    def write(path: Path, precision: str, provider: Provider = "cpu", **more: Any) -> Any:
        weights = job.statistics.imatrix if job.statistics else None
        return export_onnx(
            job.model, path, precision=precision, block_size=options.block_size, imatrix=weights, kept=job.kept,
            provider=provider, **more,
        )  # fmt: skip

    def audit(path: Path, precision: str, layer_bits: LayerBits | None = None, provider: Provider = "cpu") -> Any:
        return audit_onnx(path, job.model, precision, options.block_size, layer_bits, provider)

    reopened.append(_full_precision_onnx(job, notes))
    path = job.out / "onnx"
    _once(path, lambda path: write(path, job.precision, layer_bits=options.layer_bits))
    told = audit(path, job.precision, options.layer_bits)
    label = f"{job.precision}-mix" if options.layer_bits else job.precision
    artifacts.append(_artifact(job, "onnx", "ort", "artifacts/onnx", path, label) | told)
    reopened.append(Reopened(f"onnx {label} delivered", "ort", path, artifacts[-1]["path"]))
    if options.provider == "cuda":
        precision = "fp16" if job.precision == "fp32" else job.precision
        _once(path / "cuda", lambda path: write(path, precision, "cuda", layer_bits=options.layer_bits))
        audit(path / "cuda", precision, options.layer_bits, "cuda")
        notes.append(
            "artifacts/onnx/cuda is experimental: a float16 graph for ONNX Runtime's CUDA provider, quantized alike. Its "
            "structure, bits and bytes were checked; it was not run, and no number of this report is about it."
        )


def _full_precision_onnx(job: Job, notes: list[str]) -> Reopened:
    """The graph in float32, of the whole student or of as many of its first layers as fit into memory.

    Raises:
        ResourceProblem: not even the first layer with experts fits, so that nothing would show that the graph is right.
    """
    folder, weights = job.out / "reference", FP32_MEMORY_SHARE * psutil.virtual_memory().available / 4
    if job.params_total < weights:
        return Reopened("onnx fp32", "ort", _float32_graph(job, job.model, folder / "onnx-fp32"))
    layers = layers_within(inspect_checkpoint(job.model), weights)
    if layers <= min(job.spec.moe_layers, default=0):
        raise ResourceProblem(
            "the ONNX graph cannot be compared with the student",
            where=str(job.model), why="not even its first layers fit into memory in float32",
            next_command="--set export.formats=[gguf], or a machine with more memory",
        )  # fmt: skip
    student = folder / f"first-{layers}-layers"
    _once(student, lambda path: write_first_layers(job.model, layers, path))
    graph = _float32_graph(job, student, folder / f"onnx-fp32-first-{layers}-layers")
    part = f"the first {layers} of {job.spec.layers} layers"
    notes.append(f"the float32 ONNX graph of the whole student would not fit into memory: {part} were compared instead")
    return Reopened(f"onnx fp32 ({part})", "ort", graph, student=student)


def _float32_graph(job: Job, student: Path, folder: Path) -> Path:
    """An audited graph in float32, built once."""
    _once(folder, lambda path: export_onnx(student, path, precision="fp32"))
    audit_onnx(folder, student, "fp32", job.config.export.onnx.block_size)
    return folder


def _artifact(job: Job, kind: str, runtime: str, delivered: str, path: Path, quantization: str) -> dict[str, Any]:
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.name.startswith("model.onnx")]
    size = sum(file.stat().st_size for file in files)
    return {
        "format": kind, "runtime": runtime, "path": delivered, "quantization": quantization, "bytes": size,
        "bits_per_weight": round(8 * size / job.params_total, 3),
    }  # fmt: skip


def _judge(job: Job, exports: list[Reopened]) -> list[dict[str, Any]]:
    """Compare every file with the student; writes parity.json and the golden prompts of the device bundles."""
    judge = Judge(job.model, job.spec.family, _threads(job), job.spec.context_length)
    verdict = judge_exports(judge, exports, job.prompts)
    write_json_atomic(job.out / "parity.json", verdict.rows)
    write_json_atomic(job.out / GOLDEN, verdict.golden)
    return verdict.rows


def _threads(job: Job) -> int:
    return threads_for(job.config.target.runtime.threads)
