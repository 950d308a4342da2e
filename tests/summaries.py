"""The smallest valid summary of every stage, for tests of what comes before and after a stage."""

from typing import Any

from moe_edge.contracts.artifacts import (
    CompressSummary,
    DistillSummary,
    ExportSummary,
    PlanSummary,
    ProfileSummary,
    ValidationSummary,
)
from moe_edge.contracts.measurements import Artifact, Memory, ModelInfo, Quality, Speed

MODEL = ModelInfo(params_total=100, params_active=50, experts=4, top_k=2, bytes=400)


def measured(path: str, kind: str = "hf", **fields: Any) -> Artifact:
    """A model about which nothing was measured, and why."""
    why = "not measured in this test"
    runtime = {"hf": "hf", "gguf": "llama_cpp", "onnx": "ort"}[kind]
    known = {"format": kind, "runtime": runtime, "path": path, "bytes": 400, "device": {}} | fields
    return Artifact(quality=Quality(reason=why), speed=Speed(reason=why), memory=Memory(reason=why), **known)


def summary_of(stage: str) -> Any:
    """What a stage would return that found nothing out."""
    lists: dict[str, list[Any]] = {
        name: []
        for name in (
            *("moe_layers", "no_evidence", "super_experts", "sink_share", "gate_mass", "router_entropy_nats"),
            *("mean_cka", "mean_cka_ci95", "cka_null", "mean_gated_cka"),
        )
    }
    return {
        "profile": ProfileSummary(
            mode="whole",
            dtype="float32",
            tokens=0,
            asked_tokens=0,
            rows=0,
            calibration_digest="sha256:none",
            cka_tokens=0,
            **lists,
        ),
        "plan": PlanSummary(),
        "compress": CompressSummary(teacher=MODEL, student=MODEL),
        "distill": DistillSummary(trained=False, kept="untrained", reason="a test"),
        "export": ExportSummary(name="tiny", artifacts=[], parity=[], imatrix=False),
        "validate": ValidationSummary(artifacts=[], baseline=measured("teacher"), with_student=False),
    }[stage]
