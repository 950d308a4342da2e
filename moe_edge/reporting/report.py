"""The report of a build, put together from what its stages found and how that was judged. It measures nothing.

Beside what the stages say themselves: bits per weight of the transformers checkpoints, where the bytes of the exported files are,
what was expected of every file beside what was achieved, and the commands that come next.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from moe_edge.contracts.artifacts import CompressFolder, DistillFolder, ExportFolder, PlanFolder
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.measurements import Artifact, ModelInfo
from moe_edge.contracts.plan import Plan
from moe_edge.contracts.report import REPORT_SCHEMA, Judgement, Prediction, Report, StageInfo
from moe_edge.metrics import quality, speed
from moe_edge.storage.files import model_name, read_json

DEFINITIONS = {
    **quality.DEFINITIONS,
    **speed.DEFINITIONS,
    "peak_rss_mib": "largest resident memory of the fresh process that ran the model: interpreter, runtime, weights "
    "(also memory-mapped ones), KV cache, buffers",
    "bits_per_weight": "8 x bytes of the weight files / parameters of that model",
    "bits_per_weight_by_class": "8 x bytes of a class's tensors / their weights: scales count, file headers do not",
}
Found = TypeVar("Found", bound=BaseModel)


def build_report(
    out: Path,
    config: BuildConfig,
    stages: Sequence[StageInfo],
    *,
    plan: PlanFolder,
    compress: CompressFolder,
    distill: DistillFolder,
    export: ExportFolder,
    judgement: Judgement,
) -> Report:
    """The checked report.

    Args:
        out: the build's folder, as the commands that come next name it.
        stages: what each stage cost.

    Raises:
        ConfigError: the plan cannot be read.
    """
    health = compress.summary.routing_health
    teacher, student = _named_teacher(config, compress.summary.teacher), compress.summary.student
    artifacts = [_with_classes(_with_bits(artifact, student), export) for artifact in judgement.artifacts]
    notes = (*plan.summary.notes, *export.summary.notes, *judgement.notes)
    return Report(
        schema=REPORT_SCHEMA,
        verdict=judgement.verdict,
        reasons=judgement.reasons,
        target=config.target.name,
        teacher=teacher,
        student=student,
        stages=list(stages),
        artifacts=artifacts,
        baseline=_with_bits(judgement.baseline, teacher),
        gates=judgement.gates,
        plan=plan.plan,
        predictions=[_prediction(plan.plan, artifact) for artifact in artifacts if artifact.format != "hf"],
        curve=read_json(plan.curve) if plan.curve.is_file() else None,
        routing_health=None if health is None else _finite_model(health),
        distillation=_finite_model(distill.summary),
        parity=_finite(export.summary.parity),
        machine=judgement.machine,
        versions=judgement.versions,
        definitions=DEFINITIONS,
        notes=list(dict.fromkeys(notes)),  # each once, in the order of the stages
        next_commands=_next_commands(out, artifacts, judgement.verdict, plan.plan),
    )


def _named_teacher(config: BuildConfig, teacher: ModelInfo) -> ModelInfo:
    return ModelInfo.model_validate(teacher.model_dump() | {"name": model_name(config.teacher.path)})


def _with_bits(artifact: Artifact, model: ModelInfo) -> Artifact:
    """bits_per_weight of the transformers checkpoints, whose stage did not count parameters."""
    if artifact.bits_per_weight is not None or not model.params_total:
        return artifact
    return artifact.model_copy(update={"bits_per_weight": round(8 * artifact.bytes / model.params_total, 3)})


def _with_classes(artifact: Artifact, export: ExportFolder) -> Artifact:
    """What the export knows of a file's tensor classes."""
    exported = next((row for row in export.summary.artifacts if row.path == artifact.path), None)
    if exported is None:
        return artifact
    known = {
        "bytes_by_class": exported.bytes_by_class,
        "bits_per_weight_by_class": exported.bits_per_weight_by_class,
        "fallbacks": exported.fallbacks or {},
    }
    return artifact.model_copy(update=known)


def _finite(value: Any) -> Any:
    """Plain data with null in place of NaN and infinities (a diverged training has them), which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite_model(found: Found) -> Found:
    return type(found).model_validate(_finite(found.model_dump()))


def _prediction(plan: Plan, artifact: Artifact) -> Prediction:
    """Expected against achieved KL of a quantized artifact."""
    masked = plan.predicted_kl_nats
    if masked is None and not plan.prunes and plan.action in ("drop", "merge"):
        masked = 0.0  # nothing is dropped, and a lower top-k or width would have been measured
    bits = plan.quantization_kl_nats.get(artifact.quantization or "") if artifact.format == "gguf" else None
    reasons = [artifact.quality.reason] if artifact.quality.kl_nats is None else []
    if bits is None:
        reasons.append(f"no prediction for {artifact.format} {artifact.quantization or ''}".rstrip())
    if masked is None:
        reasons.append("the plan has no masked KL")
    return Prediction(
        artifact=artifact.path,
        masked_kl_nats=masked,
        quantization_kl_nats=bits,
        quantization_source=plan.quantization_kl_source,
        kl_nats=None if masked is None or bits is None else masked + bits,
        achieved_kl_nats=artifact.quality.kl_nats,
        achieved_quantization_kl_nats=artifact.quality.kl_to_student_nats,
        reason="; ".join(reason for reason in reasons if reason) or None,
    )


def _next_commands(out: Path, artifacts: Sequence[Artifact], verdict: str, plan: Plan) -> list[str]:
    main = next((artifact for artifact in artifacts if artifact.format == "gguf"), None)
    commands = _gguf_commands(out / main.path, plan) if main else []
    if verdict == "fail":
        commands.append(
            "moe-edge build ... --set plan.bits=Q6_K   # more bits, or --set plan.experts=0.75: more experts"
        )
        commands.append("moe-edge build ... --set distill.tokens=262144   # a longer recovery")
    return [*commands, f"moe-edge verify {out}"]


def _gguf_commands(path: Path, plan: Plan) -> list[str]:
    """How to measure and how to run a GGUF file, with the context and the KV cache that were planned."""
    length, precision = plan.estimate.context_length, plan.estimate.kv_precision
    bench, run = "", f" -c {length}" if length else ""
    if precision != "f16":
        bench = f" --set target.runtime.kv_cache={precision}"
        run += f" -fa on -ctk {precision} -ctv {precision}"
    return [f"moe-edge bench {path}{bench}", f"llama-cli -m {path}{run}"]
