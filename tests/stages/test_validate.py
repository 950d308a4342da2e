"""The stage: which files it measures, under which paths, in which precision, and that limits are no part of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_edge.contracts.artifacts import (
    DistillFolder,
    DistillSummary,
    ExportedArtifact,
    ExportFolder,
    ExportSummary,
    PlanFolder,
    PlanSummary,
    ProfileFolder,
    StageFolder,
    ValidationSummary,
)
from moe_edge.contracts.config import CalibrationConfig
from moe_edge.contracts.errors import ConfigError, DeviceProblem
from moe_edge.export.gguf import write_gguf
from moe_edge.models.loading import load_tokenizer
from moe_edge.stages import validate
from moe_edge.storage.rows import TokenRows
from moe_edge.texts.rows import heldout_rows
from tests.compression.action_helpers import HALF, plan8
from tests.evaluation.fakes import InstantTransport, build_config
from tests.stages.inputs import opened
from tests.tiny import tiny_checkpoint, tiny_ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A build up to its export: a teacher, a student of another seed, and one file of that student."""
    tiny_checkpoint(tmp_path / "elsewhere", "qwen3_moe", name="teacher")
    student = tiny_checkpoint(tmp_path / "distill", "qwen3_moe", name="model", seed=1)
    (tmp_path / "export" / "gguf").mkdir(parents=True)
    write_gguf(student, tmp_path / "export" / "gguf" / "x.gguf", name="x")
    (tmp_path / "profile").mkdir()
    TokenRows(tiny_ids(tokens=32).numpy().astype("int32"), 64).save(tmp_path / "profile" / "rows.safetensors")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return tmp_path


def run(folder: Path, gates: dict[str, Any] | None = None, kv_cache: str = "f16", **settings: Any) -> ValidationSummary:
    """The stage on `folder`."""
    plan = plan8(kept=HALF)
    plan.estimate = plan.estimate.model_copy(update={"kv_precision": kv_cache})
    (folder / "plan").mkdir(exist_ok=True)
    (folder / "plan" / "plan.json").write_text(plan.to_json())
    rows = [
        ExportedArtifact(
            format="gguf",
            runtime="llama_cpp",
            path="artifacts/gguf/x.gguf",
            quantization="F16",
            bytes=5,
            bits_per_weight=16.0,
            bytes_by_class={},
            bits_per_weight_by_class={},
        )
    ]
    untrained = DistillSummary(trained=False, kept="untrained", reason="distill.stages is empty")
    folders: dict[str, StageFolder[Any]] = {
        "profile": ProfileFolder(folder / "profile", "digest", None),
        "plan": PlanFolder(folder / "plan", "digest", PlanSummary()),
        "distill": DistillFolder(folder / "distill", "digest", untrained),
        "export": ExportFolder(
            folder / "export", "digest", ExportSummary(name="x", artifacts=rows, parity=[], imatrix=False)
        ),
    }
    config = build_config(gates, text=str(folder / "text.txt"), tokens=64, **settings)
    config = config.model_copy(update={"calibration": CalibrationConfig(sequence_length=32)})
    return validate.run(config, opened(folder / "elsewhere" / "teacher"), folder / "validate", **folders)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> InstantTransport:
    transport = InstantTransport()
    monkeypatch.setattr(validate, "open_transport", lambda address: transport)
    return transport


def test_files_are_measured_before_delivery_and_shown_where_they_will_lie(
    folder: Path, device: InstantTransport
) -> None:
    summary = run(folder, kv_cache="q8_0")
    assert [row.path for row in summary.artifacts] == ["artifacts/gguf/x.gguf", "artifacts/hf"]
    assert summary.baseline.path == "teacher" and not (folder / "artifacts").exists()
    places = [folder / "export/gguf/x.gguf", folder / "distill/model", folder / "elsewhere/teacher"]
    assert [Path(job["path"]) for job in device.jobs] == [place.resolve() for place in places]
    file, student = summary.artifacts
    assert (file.quantization, file.bytes, file.bits_per_weight) == ("F16", 5, 16.0), "as the export counted them"
    assert student.quality.kl_nats > 0.01 and file.quality.kl_to_student_nats < 0.01
    assert file.device["kv_cache"] == "q8_0", "as planned"
    assert json.loads((folder / "validate" / "results.json").read_text()) == summary.model_dump(mode="json")


def test_other_limits_find_the_same(folder: Path, device: InstantTransport) -> None:
    strict = run(folder, {"kl_to_teacher_nats": 1e-9, "decode_tokens_per_s": 1e9, "host_speed": True})
    measured = list(device.measured)
    assert run(folder, {}) == strict and device.measured == measured


def test_a_remote_device_is_refused_before_any_work(folder: Path) -> None:
    with pytest.raises(DeviceProblem):
        run(folder, device="ssh://me@board")
    assert not (folder / "validate").exists()


def test_calibration_text_is_refused(folder: Path, device: InstantTransport) -> None:
    tokenizer = load_tokenizer(folder / "elsewhere" / "teacher")
    heldout_rows(str(folder / "text.txt"), tokenizer, 64, 32).save(folder / "profile" / "rows.safetensors")
    with pytest.raises(ConfigError, match="part of the calibration text"):
        run(folder)
    assert device.jobs == []
