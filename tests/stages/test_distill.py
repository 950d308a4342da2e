"""The distill stage: the better student goes on, no training where nothing was lost, the same bytes after a kill."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moe_edge.compression.layers import Material
from moe_edge.compression.student import write_student
from moe_edge.compression.surgery import apply_plan
from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.config import BuildConfig, DistillConfig, LrMultiplier, StageConfig
from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.contracts.plan import Estimate, Plan
from moe_edge.distillation.capture import CaptureConfig, captured_signal
from moe_edge.distillation.recovery import Recovery
from moe_edge.models.loading import load_model, save_student
from moe_edge.models.pruning import prune
from moe_edge.models.students import load_student
from moe_edge.stages import distill
from moe_edge.storage.checkpoint import checkpoint_digest
from moe_edge.storage.files import sha256_file
from moe_edge.storage.folders import hash_folder
from moe_edge.storage.rows import TokenRows
from tests.distillation.parts import write_cache
from tests.tiny import tiny_checkpoint, tiny_ids

ROWS, TOKENS, VOCAB = 24, 32, 96
KEPT = {0: [0, 2, 3], 1: [0, 1, 2]}
SIZES: dict[str, Any] = {"experts": 4, "top_k": 2, "layers": 2, "hidden": 32, "width": 16, "vocab": VOCAB, "tied": True}


NORMS = [{"pattern": "norm", "lr_multiplier": 1.0}, {"pattern": ".*", "lr_multiplier": 0.0}]


def plan(kept: dict[int, list[int]]) -> Plan:
    estimate = Estimate(
        params_total=1, params_active=1, file_bytes=1, kv_cache_bytes=1, peak_memory_bytes=1,
        decode_tokens_per_s=None, routed_expert_share_kept=0.75,
    )  # fmt: skip
    return Plan(
        criterion="frequency", experts_total=4, experts_kept=len(kept[0]), top_k=2, kept=kept, quantization="F16",
        onnx_precision="fp32", predicted_kl_nats=0.1, estimate=estimate,
    )  # fmt: skip


def inputs(tmp_path: Path, dtype: torch.dtype = torch.float32, **sizes: int) -> Path:
    """profile/, plan/ and compress/ of a tiny teacher; returns the teacher's folder."""
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe", name="teacher", dtype=dtype, **(SIZES | sizes))
    for stage in ("profile", "plan", "compress", "out"):
        (tmp_path / stage).mkdir()
    ids = tiny_ids(TOKENS, ROWS, VOCAB).numpy().astype(np.int32)
    rows = TokenRows(ids, ids.size)
    rows.save(tmp_path / "profile" / "rows.safetensors")
    identity = {"teacher": "digest", "calibration": rows.digest}
    write_cache(tmp_path / "profile" / "logits.h5", load_model(teacher), ids, identity)
    (tmp_path / "plan" / "plan.json").write_text(plan(KEPT).to_json())
    student = load_model(teacher, dtype)
    prune(student, KEPT)
    with torch.no_grad():  # damage that a few steps can repair
        student.model.norm.weight.mul_(0.5)
    save_student(student, teacher, tmp_path / "compress" / "model")
    return teacher


def context(tmp_path: Path, teacher: Path, digest: str = "digest", **values: Any) -> StageContext:
    stages = [StageConfig(stage_name="all", steps=8, learning_rate=0.05, parameter_lr_multipliers=NORMS)]
    config = BuildConfig.model_construct(distill=DistillConfig(**({"stages": stages, "batch_rows": 2} | values)))
    folders = {name: tmp_path / name for name in ("profile", "plan", "compress")}
    return StageContext(config, teacher, digest, tmp_path / "out", folders)


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_training_lowers_the_held_out_kl(tmp_path: Path, dtype: torch.dtype) -> None:
    run = context(tmp_path, inputs(tmp_path, dtype), alpha=1.0)
    summary = distill.run(run)
    assert summary["kept"] == "trained" and summary["trained"]
    assert 0 < summary["after"]["kl_nats"] < summary["before"]["kl_nats"]
    assert len(summary["before"]["cka_by_layer"]) == 2 and 0 < summary["before"]["cka_mean"] < 1
    assert summary["tokens_trained"] == 8 * 2 * TOKENS and summary["held_out_tokens"] == TOKENS
    assert set(summary["seconds_per_stage"]) == {"all"} and json.dumps(summary)
    assert sorted(path.name for path in run.out.iterdir()) == ["metrics.json", "model", "train_log.jsonl"]
    assert {tensor.dtype for tensor in load_file(run.out / "model" / "model.safetensors").values()} == {dtype}
    log = [json.loads(line) for line in (run.out / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 9)) and log[0]["stage"] == "all"
    assert "seconds" not in (run.out / "metrics.json").read_text()
    with torch.no_grad():
        assert load_model(run.out / "model")(tiny_ids(vocab=VOCAB)).logits.isfinite().all()


def test_the_same_bytes_also_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = context(tmp_path, inputs(tmp_path), alpha=1.0)
    distill.run(run)
    first = digests(run.out)
    for path in ("model", "metrics.json", "train_log.jsonl"):
        (run.out / path).rename(tmp_path / f"old-{path}")

    class Killed(BaseException):
        pass

    plain = distill.save_student

    def killed(*arguments: Any) -> None:
        plain(*arguments)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(distill, "save_student", killed)
        distill.run(run)
    assert (run.out / "checkpoints").exists()
    monkeypatch.setattr(Recovery, "trainer", lambda *_: pytest.fail("trained again"))
    distill.run(run)
    assert digests(run.out) == first


def test_events_for_tensorboard_do_not_enter_the_digest(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    teacher = inputs(tmp_path)
    run = context(tmp_path, teacher, alpha=1.0)
    distill.run(run)
    without = hash_folder(run.out)
    distill.run(context(tmp_path, teacher, alpha=1.0, tensorboard=True))
    assert list((run.out / "tensorboard" / "all").glob("events.*")) and hash_folder(run.out) == without


def test_a_worse_student_is_not_kept(tmp_path: Path) -> None:
    ruinous = [StageConfig(stage_name="all", steps=4, learning_rate=1.0, losses={"kl": 1.0})]
    run = context(tmp_path, inputs(tmp_path), stages=ruinous)
    summary = distill.run(run)
    assert summary["kept"] == "untrained" and summary["after"]["kl_nats"] > summary["before"]["kl_nats"]
    assert digests(run.out / "model") == digests(tmp_path / "compress" / "model")
    assert 0 < summary["before"]["cka_mean"] < 1 and "debiased" in summary["cka"]  # shown whatever a stage trains on


def test_cka_of_a_teacher_beyond_memory_is_null_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "fits_in_memory", lambda *_: False)
    stages = [StageConfig(stage_name="all", steps=2, learning_rate=0.01, losses={"kl": 1.0})]
    summary = distill.run(context(tmp_path, inputs(tmp_path), stages=stages))
    assert summary["before"]["cka_by_layer"] is None and "does not fit" in summary["cka"]


def test_the_log_is_free_of_clocks(tmp_path: Path) -> None:
    on_policy = {"share": 0.5, "prompt_tokens": 4, "new_tokens": (2, 4)}
    stage = {"stage_name": "a", "steps": 2, "losses": {"reverse_kl": 1.0}, "on_policy": on_policy}
    run = context(tmp_path, inputs(tmp_path), stages=[StageConfig(**stage)])
    distill.run(run)
    log = [json.loads(line) for line in (run.out / "train_log.jsonl").read_text().splitlines()]
    assert sum(line["rollout_tokens"] for line in log) > 0 and not [
        name for name in log[0] if name.endswith("_seconds")
    ]


def test_a_capture_of_other_text_is_data_too(tmp_path: Path) -> None:
    teacher = inputs(tmp_path)
    rows = TokenRows(tiny_ids(TOKENS, 12, VOCAB).numpy().astype(np.int32)[:, ::-1].copy(), 12 * TOKENS)
    captured_signal(teacher, rows, tmp_path / "capture", CaptureConfig(k=16, temperatures=(1.0,))).close()
    run = context(tmp_path, teacher, checkpoint_digest(teacher), data=str(tmp_path / "capture"), temperature=1.0)
    summary = distill.run(run)
    assert summary["kept"] == "trained" and summary["held_out_tokens"] == TOKENS
    with pytest.raises(InputRejected, match="teacher"):
        distill.run(context(tmp_path, teacher, "another", data=str(tmp_path / "capture")))


def test_half_of_the_teachers_experts_teach_by_their_cka_with_the_layer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher, starts = inputs(tmp_path), {}
    caplog.set_level(logging.INFO, logger="moe_edge.distillation.expert_terms")
    for share in (1.0, 0.5):
        stage = StageConfig(
            stage_name="a", steps=2, learning_rate=0.003, expert_share=share, losses={"expert_cka": 1.0}
        )
        run = context(tmp_path, teacher, stages=[stage])
        distill.run(run)
        log = [json.loads(line) for line in (run.out / "train_log.jsonl").read_text().splitlines()]
        assert (run.out / "expert_layers.json").exists() == (share < 1)
        said = [record.message for record in caplog.records if "learns from" in record.message]
        assert said and all(f"learns from {round(4 * share)} experts" in line for line in said)
        caplog.clear()
        starts[share] = log[0]["expert_cka_loss"]
    assert starts[1.0] != starts[0.5]  # other experts are the targets
    table = json.loads((run.out / "expert_layers.json").read_text())
    assert table["tokens"] == 8 * TOKENS and set(table["student_layers"]) == {"0", "1"}
    best = table["student_layers"]["1"]
    assert [row["rank"] for row in best] == list(range(1, len(best) + 1)) and best[0]["cka"] >= best[-1]["cka"]


def test_nothing_pruned_or_no_stages_means_no_training(tmp_path: Path) -> None:
    teacher = inputs(tmp_path)
    run = context(tmp_path, teacher, stages=[])
    assert "empty" in distill.run(run)["reason"]
    assert digests(run.out / "model") == digests(tmp_path / "compress" / "model")
    (tmp_path / "plan" / "plan.json").write_text(plan({0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}).to_json())
    summary = distill.run(context(tmp_path, teacher))
    assert summary["tokens_trained"] == 0 and "changes no expert" in summary["reason"]
    assert (run.out / "train_log.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("values", "message"),
    (
        ({"data": "text.jsonl"}, "no calibration recipe or file"),
        ({"temperature": 2.5}, "temperature 2.5"),
        ({"alpha": 1.0, "stages": [StageConfig(stage_name="a", steps=1, losses={"ce": 1.0})]}, "no loss"),
        ({"stages": [StageConfig(stage_name="a", steps=1, parameter_lr_multipliers=[
            {"pattern": "absent", "lr_multiplier": 1.0}])]}, "no effect"),
    ),
)  # fmt: skip
def test_what_cannot_be_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
) -> None:
    teacher = inputs(tmp_path)
    monkeypatch.setattr(Recovery, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(ConfigError, match=message):
        distill.run(context(tmp_path, teacher, **values))


def test_another_teachers_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match="found digest, expected other"):
        distill.run(context(tmp_path, inputs(tmp_path), digest="other"))


def test_a_student_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    teacher = inputs(tmp_path)
    path = tmp_path / "compress" / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    first, second = list(content["model"]["vocab"])[-2:]
    vocab = content["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(content))
    with pytest.raises(InputRejected, match="different tokenizers"):
        distill.run(context(tmp_path, teacher))


@pytest.mark.parametrize("action", ["shared-core", "dense"])
def test_students_of_other_actions_are_trained_and_leave_a_plain_model(tmp_path: Path, action: str) -> None:
    teacher = inputs(tmp_path)
    changed = plan(KEPT).model_copy(update={"action": action, "shared_rank": 2 if action == "shared-core" else None})
    (tmp_path / "plan" / "plan.json").write_text(changed.to_json())
    rows = torch.from_numpy(TokenRows.load(tmp_path / "profile" / "rows.safetensors").ids_NS)
    applied = apply_plan(load_model(teacher), changed, Material(None, rows))
    with torch.no_grad():  # damage that a few steps can repair
        for name, parameter in applied.model.named_parameters():
            if name.endswith(("output_wrapper.scale", "mlp.down_proj.weight")):
                parameter.mul_(-1)
    write_student(applied, teacher, tmp_path / "compress")
    experts = [LrMultiplier(pattern=r"\.mlp\.", lr_multiplier=1.0), LrMultiplier(pattern=".*", lr_multiplier=0.0)]
    stages = [StageConfig(stage_name="experts", steps=8, learning_rate=0.02, parameter_lr_multipliers=experts)]
    run = context(tmp_path, teacher, alpha=1.0, stages=stages)
    summary = distill.run(run)
    assert summary["kept"] == "trained" and summary["after"]["kl_nats"] < summary["before"]["kl_nats"]
    plain = load_student(run.out / "model")
    with torch.no_grad():
        logits = plain(tiny_ids(vocab=VOCAB)).logits
    assert plain.config.model_type == ("qwen3" if action == "dense" else "qwen3_moe") and logits.isfinite().all()
    assert (run.out / "shared_core").is_dir() == (action == "shared-core")
    if action == "shared-core":
        with torch.no_grad():
            trainable = load_student(run.out / "shared_core")(tiny_ids(vocab=VOCAB)).logits
        assert float((trainable - logits).abs().max()) < 1e-5
