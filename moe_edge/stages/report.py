"""report: everything a build found out, as report.json (checked against its schema) and report.md (for people).

It only reads what the stages returned; it measures nothing, so `moe-edge report RUN` may rebuild it at any time.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.plan import Plan
from moe_edge.contracts.report import REPORT_SCHEMA, Artifact, GateResult, ModelInfo, Prediction, Report, StageInfo
from moe_edge.metrics import quality, speed
from moe_edge.reporting.report_markdown import render
from moe_edge.storage.files import read_json, write_json_atomic, write_text_atomic

NOT_VALIDATED: dict[str, Any] = {
    "verdict": "fail",
    "reasons": ["validate has not run, and nothing measured is not a pass"],
    "artifacts": [],
    "gates": [],
}
CLASS_FIELDS = ("bytes_by_class", "bits_per_weight_by_class", "fallbacks")
DEFINITIONS = {
    **quality.DEFINITIONS,
    **speed.DEFINITIONS,
    "peak_rss_mib": "largest resident memory of the fresh process that ran the model: interpreter, runtime, weights "
    "(also memory-mapped ones), KV cache, buffers",
    "bits_per_weight": "8 x bytes of the weight files / parameters of that model",
    "bits_per_weight_by_class": "8 x bytes of a class's tensors / their weights: scales count, file headers do not",
}


def write_report(
    run_dir: Path,
    stages: Sequence[Mapping[str, Any]],
    config: BuildConfig,
    summaries: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Write report.json and report.md into the run's folder.

    Args:
        run_dir: the build's output folder.
        stages: rows of name, seconds, peak_rss_mib, cached.
        config: the resolved configuration.
        summaries: what each stage returned, by the stage's name.

    Returns:
        report.json as plain data.
    """
    report = build_report(run_dir, stages, config, summaries)
    data = report.model_dump(mode="json", by_alias=True)
    write_json_atomic(run_dir / "report.json", data)
    write_text_atomic(run_dir / "report.md", render(report))
    return data


def build_report(
    run_dir: Path,
    stages: Sequence[Mapping[str, Any]],
    config: BuildConfig,
    summaries: Mapping[str, Mapping[str, Any]],
) -> Report:
    """The checked report; arguments as in write_report."""
    measured = summaries.get("validate", NOT_VALIDATED)
    teacher, student = _models(config, summaries["compress"])
    exported = {row["path"]: row for row in summaries.get("export", {}).get("artifacts", [])}
    artifacts = [
        _with_classes(_with_bits(Artifact(**row), student), exported.get(row["path"], {}))
        for row in measured["artifacts"]
    ]
    baseline, plan = measured.get("baseline"), _plan(run_dir)
    return Report(
        schema=REPORT_SCHEMA,
        verdict=measured["verdict"],
        reasons=measured["reasons"],
        target=config.target.name,
        teacher=teacher,
        student=student,
        stages=[StageInfo(**row) for row in stages],
        artifacts=artifacts,
        baseline=_with_bits(Artifact(**baseline), teacher) if baseline else None,
        gates=[GateResult(**row) for row in measured["gates"]],
        plan=plan,
        predictions=predictions(plan, artifacts),
        curve=_read_json(run_dir / "plan" / "curve.json"),
        routing_health=finite(summaries["compress"].get("routing_health")),
        distillation=finite(dict(summaries["distill"])) if "distill" in summaries else None,
        parity=finite(list(summaries.get("export", {}).get("parity", []))),
        machine=measured.get("machine", {}),
        versions=measured.get("versions", {}),
        definitions=DEFINITIONS,
        notes=_notes(summaries),
        next_commands=_next_commands(run_dir, artifacts, measured["verdict"], plan),
    )


def _models(config: BuildConfig, compress: Mapping[str, Any]) -> tuple[ModelInfo, ModelInfo]:
    """Teacher and student as the compress stage counted them."""
    name = Path(config.teacher.path).name if config.teacher.path else "demo teacher"
    student = {key: value for key, value in compress.items() if key not in ("teacher", "notes", "routing_health")}
    return ModelInfo.model_validate(compress["teacher"] | {"name": name}), ModelInfo.model_validate(student)


def _with_bits(artifact: Artifact, model: ModelInfo) -> Artifact:
    """bits_per_weight of the transformers checkpoints, whose stage did not count parameters."""
    if artifact.bits_per_weight is not None or not model.params_total:
        return artifact
    return artifact.model_copy(update={"bits_per_weight": round(8 * artifact.bytes / model.params_total, 3)})


def _with_classes(artifact: Artifact, exported: Mapping[str, Any]) -> Artifact:
    """What the export knows of a file's tensor classes; nothing where it told nothing."""
    told = {name: exported[name] for name in CLASS_FIELDS if name in exported}
    return Artifact.model_validate(artifact.model_dump() | told)


def finite(value: Any) -> Any:
    """Plain data with null in place of NaN and infinities (a diverged training has them), which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plan(run_dir: Path) -> dict[str, Any] | None:
    """plan.json without the expert lists, which it keeps itself."""
    path = run_dir / "plan" / "plan.json"
    if not path.is_file():
        return None
    return Plan.read(path).model_dump(mode="json", by_alias=True, exclude={"kept"})


def _read_json(path: Path) -> dict[str, Any] | None:
    return dict(read_json(path)) if path.is_file() else None


def predictions(plan: Mapping[str, Any] | None, artifacts: Sequence[Artifact]) -> list[Prediction]:
    """Expected against achieved KL of every quantized artifact."""
    if plan is None:
        return []
    return [_prediction(plan, artifact) for artifact in artifacts if artifact.format != "hf"]


def _prediction(plan: Mapping[str, Any], artifact: Artifact) -> Prediction:
    masked = plan["predicted_kl_nats"]
    if masked is None and plan["experts_kept"] == plan["experts_total"] and plan["action"] in ("drop", "merge"):
        masked = 0.0  # nothing is dropped, and a lower top-k or width would have been measured
    bits = plan["quantization_kl_nats"].get(artifact.quantization) if artifact.format == "gguf" else None
    known = masked is not None and bits is not None
    reasons = [artifact.quality.reason] if artifact.quality.kl_nats is None else []
    if bits is None:
        reasons.append(f"no prediction for {artifact.format} {artifact.quantization or ''}".rstrip())
    if masked is None:
        reasons.append("the plan has no masked KL")
    return Prediction(
        artifact=artifact.path,
        masked_kl_nats=masked,
        quantization_kl_nats=bits,
        quantization_source=plan["quantization_kl_source"],
        kl_nats=masked + bits if known else None,
        achieved_kl_nats=artifact.quality.kl_nats,
        achieved_quantization_kl_nats=artifact.quality.kl_to_student_nats,
        reason="; ".join(reason for reason in reasons if reason) or None,
    )


def _notes(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the stages had to say, each note once, in the order of the stages."""
    return list(dict.fromkeys(str(note) for summary in summaries.values() for note in summary.get("notes", [])))


def _gguf_commands(run_dir: Path, artifact: Artifact, plan: Mapping[str, Any] | None) -> list[str]:
    """How to measure and how to run a GGUF file, with the context and the KV cache that were planned."""
    path, bench, run = run_dir / artifact.path, "", ""
    if plan is not None:
        estimate = plan["estimate"]
        run = f" -c {estimate['context_length']}" if estimate["context_length"] else ""
        if estimate["kv_precision"] != "f16":
            bench = f" --set target.runtime.kv_cache={estimate['kv_precision']}"
            run += f" -fa on -ctk {estimate['kv_precision']} -ctv {estimate['kv_precision']}"
    return [f"moe-edge bench {path}{bench}", f"llama-cli -m {path}{run}"]


def _next_commands(
    run_dir: Path, artifacts: Sequence[Artifact], verdict: str, plan: Mapping[str, Any] | None
) -> list[str]:
    commands = [
        line for artifact in artifacts if artifact.format == "gguf" for line in _gguf_commands(run_dir, artifact, plan)
    ]
    commands = commands[:2]  # of the main file
    if verdict == "fail":
        commands.append(
            "moe-edge build ... --set plan.bits=Q6_K   # more bits, or --set plan.experts=0.75: more experts"
        )
        commands.append("moe-edge build ... --set distill.tokens=262144   # a longer recovery")
    return [*commands, f"moe-edge verify {run_dir}"]
