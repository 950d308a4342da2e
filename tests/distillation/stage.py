"""Shared parts of the tests of the distill stage: profile/, plan/ and compress/ of a tiny teacher, and a run on them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_edge.contracts.artifacts import (
    CompressFolder,
    CompressSummary,
    DistillSummary,
    PlanFolder,
    PlanSummary,
    ProfileFolder,
    ProfileSummary,
)
from moe_edge.contracts.config import BuildConfig, CalibrationConfig, DistillConfig, ProfileConfig, StageConfig
from moe_edge.contracts.plan import Estimate, Plan
from moe_edge.models.loading import load_model, save_student
from moe_edge.models.pruning import prune
from moe_edge.stages import distill
from moe_edge.storage.files import sha256_file
from moe_edge.storage.rows import TokenRows
from tests.distillation.parts import teacher_of, write_cache
from tests.tiny import tiny_checkpoint, tiny_ids

ROWS, TOKENS, VOCAB = 24, 32, 96
KEPT = {0: [0, 2, 3], 1: [0, 1, 2]}
SIZES: dict[str, Any] = {"experts": 4, "top_k": 2, "layers": 2, "hidden": 32, "width": 16, "vocab": VOCAB, "tied": True}
NORMS = [{"pattern": "norm", "lr_multiplier": 1.0}, {"pattern": ".*", "lr_multiplier": 0.0}]


def plan(kept: dict[int, list[int]]) -> Plan:
    estimate = Estimate(
        params_total=1,
        params_active=1,
        file_bytes=1,
        kv_cache_bytes=1,
        peak_memory_bytes=1,
        decode_tokens_per_s=None,
        routed_expert_share_kept=0.75,
    )
    return Plan(
        criterion="frequency",
        experts_total=4,
        experts_kept=len(kept[0]),
        top_k=min(2, len(kept[0])),
        kept=kept,
        quantization="F16",
        onnx_precision="fp32",
        predicted_kl_nats=0.1,
        estimate=estimate,
    )


def write_plan(folder: Path, changed: Plan) -> None:
    (folder / "plan" / "plan.json").write_text(changed.to_json())


def inputs(
    folder: Path, dtype: torch.dtype = torch.float32, kept: dict[int, list[int]] | None = None, **sizes: int
) -> Path:
    """profile/, plan/ and compress/ of a tiny teacher; returns the teacher's folder."""
    kept = kept or KEPT
    teacher = tiny_checkpoint(folder, "qwen3_moe", name="teacher", dtype=dtype, **(SIZES | sizes))
    for stage in ("profile", "plan", "compress"):
        (folder / stage).mkdir()
    ids = tiny_ids(TOKENS, ROWS, VOCAB).numpy().astype(np.int32)
    rows = TokenRows(ids, ids.size)
    rows.save(folder / "profile" / "rows.safetensors")
    write_cache(
        folder / "profile" / "logits.h5", load_model(teacher), ids, {"teacher": "digest", "calibration": rows.digest}
    )
    write_plan(folder, plan(kept))
    student = load_model(teacher, dtype)
    prune(student, kept)
    with torch.no_grad():  # damage that a few steps can repair
        student.model.norm.weight.mul_(0.5)
    save_student(student, teacher, folder / "compress" / "model")
    return teacher


def distill_config(**values: Any) -> BuildConfig:
    """Eight steps on the norms, unless `values` of the section `distill` say otherwise."""
    stages = [StageConfig(stage_name="all", steps=8, learning_rate=0.05, parameter_lr_multipliers=NORMS)]
    settings = DistillConfig.model_validate({"stages": stages, "batch_rows": 2} | values)
    calibration = CalibrationConfig(sequence_length=TOKENS)
    return BuildConfig.model_construct(distill=settings, calibration=calibration, profile=ProfileConfig())


def run(folder: Path, teacher: Path, digest: str | None = "digest", out: str = "out", **values: Any) -> DistillSummary:
    """The stage on the folders of `inputs`, into `out`; digest None: the teacher's own."""
    return run_with(distill_config(**values), folder, teacher, digest, out)


def run_with(
    config: BuildConfig, folder: Path, teacher: Path, digest: str | None = "digest", out: str = "out"
) -> DistillSummary:
    """The same with a whole configuration."""
    opened = teacher_of(teacher)
    (folder / out).mkdir(exist_ok=True)
    summary = distill.run(
        config,
        opened if digest is None else replace(opened, digest=digest),
        folder / out,
        profile=ProfileFolder(folder / "profile", "", ProfileSummary.model_construct()),
        plan=PlanFolder(folder / "plan", "", PlanSummary()),
        compress=CompressFolder(folder / "compress", "", CompressSummary.model_construct()),
    )
    assert summary is not None
    return summary


def digests(folder: Path) -> dict[str, str]:
    """Of all files but those whose name begins with a dot."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): sha256_file(path) for path in found}
