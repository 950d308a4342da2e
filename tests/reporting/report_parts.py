"""A finished build as values, for tests of the report: every part can be replaced."""

import json
from pathlib import Path
from typing import Any

from moe_edge.contracts.artifacts import (
    CompressFolder,
    CompressSummary,
    DistillFolder,
    DistillSummary,
    ExportedArtifact,
    ExportFolder,
    ExportSummary,
    HeldOut,
    PlanFolder,
    PlanSummary,
    TrainedStage,
)
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.measurements import Artifact, ModelInfo
from moe_edge.contracts.plan import Candidate, Estimate, Plan
from moe_edge.contracts.report import GateResult, Judgement, Report, StageInfo
from moe_edge.contracts.targets_io import load_target
from moe_edge.reporting.report import build_report

DEAD = {"reason": "failed:oom: the process was killed"}
STUDENT = {"params_total": 8_000_000, "params_active": 3_000_000, "experts": 10, "top_k": 4, "bytes": 16_000_000}
TEACHER = STUDENT | {"params_total": 11_000_000, "experts": 16, "bytes": 22_000_000}
TRAINED = DistillSummary(
    trained=True,
    kept="trained",
    reason="held-out KL fell",
    tokens_trained=65536,
    held_out_tokens=4096,
    held_out_kl="cached top-32",
    cka="debiased linear CKA",
    before=HeldOut(kl_nats=0.3, cka_mean=0.9, cka_by_layer=[0.9]),
    after=HeldOut(kl_nats=0.06, cka_mean=0.97, cka_by_layer=[0.97]),
    stages=[
        TrainedStage(stage="experts", steps=9, tokens=65536, teacher="live", first_and_last={"total_loss": (2.5, 2.1)})
    ],
)
PARITY = [
    {
        "artifact": "gguf F16",
        "max_abs_logit": 0.01,
        "kl_nats": 1e-6,
        "top1_agreement": 1.0,
        "greedy_equal": 16,
        "greedy_compared": 16,
        "clear_tokens": 240,
        "n_tokens": 256,
        "perplexity": 12.5,
        "student_perplexity": 12.4,
        "tokenizer": {"tokens": 9, "equal": True, "text_returns": True},
        "rule": "logits and KL",
        "passed": True,
    },
    {
        "artifact": "gguf F16 against onnx fp32",
        "pair": ["gguf F16", "onnx fp32"],
        "kl_nats": 2e-6,
        "limit_kl_nats": 0.01,
        "top1_agreement": 1.0,
        "passed": True,
    },
]


def measured(kind: str = "gguf", **changes: Any) -> Artifact:
    """An artifact of a format, all numbers known."""
    row: dict[str, Any] = {
        "format": kind,
        "runtime": {"gguf": "llama_cpp", "onnx": "ort", "hf": "hf"}[kind],
        "quantization": {"gguf": "Q4_K_M", "onnx": "int4", "hf": None}[kind],
        "path": f"artifacts/{kind}/x",
        "bytes": 5_000_000,
        "bits_per_weight": None if kind == "hf" else 4.8,
        "quality": {
            "kl_nats": 0.0512,
            "kl_nats_ci95": [0.04, 0.06],
            "kl_to_student_nats": 0.01,
            "top1_agreement": 0.91,
            "perplexity": 12.0,
            "teacher_perplexity": 11.0,
            "n_tokens": 4088,
        },
        "speed": {
            "ttft_ms_p50": 12.5,
            "prefill_tokens_per_s": 900.0,
            "decode_tokens_per_s": 123.4,
            "decode_p95_ms": 9.0,
            "n_runs": 5,
            "cov": 0.02,
            "n_intervals": 315,
        },
        "memory": {"peak_rss_mib": 210.0},
        "device": {"label": "host"},
    }
    return Artifact.model_validate(row | changes)


def exported(kind: str = "gguf", **changes: Any) -> ExportedArtifact:
    """What the export knows of the same artifact."""
    known = measured(kind).model_dump(include={"format", "runtime", "path", "quantization", "bytes", "bits_per_weight"})
    return ExportedArtifact(**known | {"bytes_by_class": {}, "bits_per_weight_by_class": {}} | changes)


def judged(**changes: Any) -> Judgement:
    """A passed judgement of three artifacts."""
    gate = GateResult(
        name="kl_to_teacher_nats",
        artifact="artifacts/gguf/x",
        limit=0.15,
        value=0.0512,
        unit="nats/token",
        direction="at most",
        passed=True,
    )
    values: dict[str, Any] = {
        "artifacts": [measured(), measured("onnx"), measured("hf")],
        "baseline": measured("hf", path="teacher"),
        "gates": [gate],
        "verdict": "pass",
        "reasons": [],
        "notes": ["measured on this host"],
        "machine": {"cpu": "Some CPU", "cores": 2, "governor": None},
        "versions": {"torch": "2.13.0"},
    }
    return Judgement(**values | changes)


def planned(**changes: Any) -> Plan:
    """A plan that keeps one expert of 16."""
    estimate = Estimate(
        params_total=8_000_000,
        params_active=3_000_000,
        file_bytes=5_100_000,
        kv_cache_bytes=10,
        peak_memory_bytes=9_000_000,
        decode_tokens_per_s=None,
        routed_expert_share_kept=0.625,
    )
    values: dict[str, Any] = {
        "criterion": "frequency",
        "experts_total": 16,
        "experts_kept": 1,
        "top_k": 1,
        "kept": {0: [3]},
        "quantization": "Q4_K_M",
        "onnx_precision": "int4",
        "predicted_kl_nats": 0.31,
        "quantization_by_class": {"expert_down@0-1": "Q3_K"},
        "quantization_kl_nats": {"Q4_K_M": 0.02},
        "quantization_kl_source": "measured",
        "estimate": estimate,
        "competitor": "quantizing harder lost by 0.1 nats",
        "candidates": [
            Candidate(criterion=name, kl_nats=kl, n_tokens=4096) for name, kl in (("frequency", 0.31), ("random", 0.9))
        ],
    }
    return Plan(**values | changes)


def folders(
    folder: Path,
    *,
    plan: Plan | None = None,
    curve: dict[str, Any] | None = None,
    distill: DistillSummary = TRAINED,
    export: list[ExportedArtifact] | None = None,
    **compress: Any,
) -> dict[str, Any]:
    """The folders of a build's stages, as a report takes them."""
    (folder / "plan").mkdir(parents=True, exist_ok=True)
    (folder / "plan" / "plan.json").write_text((plan or planned()).to_json())
    if curve is not None:
        (folder / "plan" / "curve.json").write_text(json.dumps(curve))
    teacher, student = ModelInfo(**TEACHER), ModelInfo(**STUDENT)
    exported = ExportSummary(
        name="x", artifacts=export or [], parity=PARITY, notes=["a note of export", "a note"], imatrix=True
    )
    return {
        "plan": PlanFolder(folder / "plan", "digest", PlanSummary(notes=["a note of the plan", "a note"])),
        "compress": CompressFolder(
            folder / "compress", "digest", CompressSummary(teacher=teacher, student=student, **compress)
        ),
        "distill": DistillFolder(folder / "distill", "digest", distill),
        "export": ExportFolder(folder / "export", "digest", exported),
    }


def some_report(folder: Path, judgement: Judgement | None = None, teacher: str | None = None, **parts: Any) -> Report:
    """The report of a build in `folder`."""
    target = load_target("cpu").model_dump(by_alias=True)
    config = BuildConfig.model_validate({"target": target, "teacher": {"path": teacher}})
    stages = [StageInfo(name="profile", seconds=12.34, peak_rss_mib=500.0, cached=False)]
    return build_report(folder, config, stages, judgement=judgement or judged(), **folders(folder, **parts))
