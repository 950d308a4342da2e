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
from moe_edge.compression.surgery import apply_plan
from moe_edge.contracts.config import LrMultiplier, StageConfig
from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.distillation.capture import CaptureConfig, captured_signal
from moe_edge.distillation.recovery import Recovery
from moe_edge.models.loading import load_model, save_student
from moe_edge.models.students import TRAINABLE, is_shared_core, load_student, plain_form, save_trainable
from moe_edge.process import placement
from moe_edge.stages import distill
from moe_edge.storage.folders import hash_folder
from moe_edge.storage.rows import TokenRows
from tests.distillation.parts import teacher_of
from tests.distillation.stage import KEPT, TOKENS, VOCAB, digests, inputs, plan, run, write_plan
from tests.tiny import tiny_ids


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_training_lowers_the_held_out_kl(tmp_path: Path, dtype: torch.dtype) -> None:
    summary, out = run(tmp_path, inputs(tmp_path, dtype), alpha=1.0), tmp_path / "out"
    assert summary.kept == "trained" and summary.trained and summary.before and summary.after
    assert 0 < summary.after.kl_nats < summary.before.kl_nats
    assert len(summary.before.cka_by_layer) == 2 and 0 < summary.before.cka_mean < 1
    assert summary.tokens_trained == 8 * 2 * TOKENS and summary.held_out_tokens == TOKENS
    assert set(summary.seconds_per_stage) == {"all"} and summary.model_dump_json()
    names = [".placement.json", "metrics.json", "model", "recipe.json", "train_log.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert {tensor.dtype for tensor in load_file(out / "model" / "model.safetensors").values()} == {dtype}
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(1, 9)) and log[0]["stage"] == "all"
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["before"]) == {"kl_nats", "cka_mean", "cka_by_layer"}
    assert set(metrics) == set(type(summary).model_fields) - {"seconds_per_stage"}
    with torch.no_grad():
        assert load_model(out / "model")(tiny_ids(vocab=VOCAB)).logits.isfinite().all()


def test_the_same_bytes_also_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = inputs(tmp_path)
    run(tmp_path, teacher, out="straight", alpha=1.0)

    class Killed(BaseException):
        pass

    plain = distill.save_student

    def killed(*arguments: Any) -> None:
        plain(*arguments)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(distill, "save_student", killed)
        run(tmp_path, teacher, alpha=1.0)
    assert (tmp_path / "out" / "checkpoints").exists()
    monkeypatch.setattr(Recovery, "trainer", lambda *_: pytest.fail("trained again"))
    run(tmp_path, teacher, alpha=1.0)
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")


def test_events_for_tensorboard_do_not_enter_the_digest(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    teacher = inputs(tmp_path)
    run(tmp_path, teacher, out="without", alpha=1.0)
    run(tmp_path, teacher, alpha=1.0, tensorboard=True)
    assert list((tmp_path / "out" / "tensorboard" / "all").glob("events.*"))
    assert hash_folder(tmp_path / "out") == hash_folder(tmp_path / "without")


@pytest.mark.parametrize("rate", [1.0, 1e30], ids=["worse", "nan"])
def test_a_worse_student_is_not_kept(rate: float, tmp_path: Path) -> None:
    ruinous = [StageConfig(stage_name="all", steps=4, learning_rate=rate, losses={"kl": 1.0})]
    summary = run(tmp_path, inputs(tmp_path), stages=ruinous)
    assert summary.kept == "untrained" and summary.reason.startswith("held-out KL did not fall")
    after = json.loads((tmp_path / "out" / "metrics.json").read_text())["after"]
    assert after["kl_nats"] is None if rate > 1 else after["kl_nats"] > summary.before.kl_nats  # JSON has no NaN
    assert digests(tmp_path / "out" / "model") == digests(tmp_path / "compress" / "model")
    assert 0 < summary.before.cka_mean < 1 and "debiased" in summary.cka  # shown whatever a stage trains on


def test_cka_of_a_teacher_beyond_memory_is_null_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "fits_in_memory", lambda *_: False)
    stages = [StageConfig(stage_name="all", steps=2, learning_rate=0.01, losses={"kl": 1.0})]
    summary = run(tmp_path, inputs(tmp_path), stages=stages)
    assert summary.before.cka_by_layer is None and "does not fit" in summary.cka
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["after"] == {"kl_nats": summary.after.kl_nats, "cka_mean": None, "cka_by_layer": None}


def test_the_log_is_free_of_clocks(tmp_path: Path) -> None:
    on_policy = {"share": 0.5, "prompt_tokens": 4, "new_tokens": (2, 4)}
    stage = {"stage_name": "a", "steps": 2, "losses": {"reverse_kl": 1.0}, "on_policy": on_policy}
    run(tmp_path, inputs(tmp_path), stages=[stage])
    log = log_of(tmp_path / "out")
    assert sum(line["rollout_tokens"] for line in log) > 0
    assert not [name for name in log[0] if name.endswith("_seconds")]
    assert "seconds" not in (tmp_path / "out" / "metrics.json").read_text()


def test_a_capture_of_other_text_is_data_too(tmp_path: Path) -> None:
    teacher = inputs(tmp_path)
    rows = TokenRows(tiny_ids(TOKENS, 12, VOCAB).numpy().astype(np.int32)[:, ::-1].copy(), 12 * TOKENS)
    settings = CaptureConfig(k=16, temperatures=(1.0,))
    captured_signal(teacher_of(teacher), rows, tmp_path / "capture", settings).close()
    summary = run(tmp_path, teacher, digest=None, data=str(tmp_path / "capture"), temperature=1.0)
    assert summary.kept == "trained" and summary.held_out_tokens == TOKENS
    with pytest.raises(InputRejected, match="teacher"):
        run(tmp_path, teacher, digest="another", data=str(tmp_path / "capture"))


def test_half_of_the_teachers_experts_teach_by_their_cka_with_the_layer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher, starts = inputs(tmp_path), {}
    caplog.set_level(logging.INFO, logger="moe_edge.distillation.expert_terms")
    for share in (1.0, 0.5):
        stage = {"stage_name": "a", "steps": 2, "learning_rate": 0.003, "losses": {"expert_cka": 1.0}}
        out = tmp_path / str(share)
        run(tmp_path, teacher, out=out.name, stages=[stage | {"expert_share": share}])
        assert (out / "expert_layers.json").exists() == (share < 1)
        messages = [record.message for record in caplog.records if "learns from" in record.message]
        assert messages and all(f"learns from {round(4 * share)} experts" in line for line in messages)
        caplog.clear()
        starts[share] = log_of(out)[0]["expert_cka_loss"]
    assert starts[1.0] != starts[0.5]  # other experts are the targets
    table = json.loads((tmp_path / "0.5" / "expert_layers.json").read_text())
    assert table["tokens"] == 8 * TOKENS and set(table["student_layers"]) == {"0", "1"}
    best = table["student_layers"]["1"]
    assert [row["rank"] for row in best] == list(range(1, len(best) + 1)) and best[0]["cka"] >= best[-1]["cka"]


def test_nothing_pruned_or_no_stages_means_no_training(tmp_path: Path) -> None:
    teacher = inputs(tmp_path)
    assert "empty" in run(tmp_path, teacher, stages=[]).reason
    assert digests(tmp_path / "out" / "model") == digests(tmp_path / "compress" / "model")
    write_plan(tmp_path, plan({0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}))
    summary = run(tmp_path, teacher)
    assert summary.tokens_trained == 0 and summary.kept == "untrained" and "changes no expert" in summary.reason
    assert (tmp_path / "out" / "train_log.jsonl").read_text() == ""
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics == {"trained": False, "reason": summary.reason}


NO_EFFECT = {"stage_name": "a", "steps": 1, "parameter_lr_multipliers": [{"pattern": "absent", "lr_multiplier": 1.0}]}


@pytest.mark.parametrize(
    ("values", "message"),
    (
        ({"data": "text.jsonl"}, "no calibration recipe or file"),
        ({"temperature": 2.5}, "temperature 2.5"),
        ({"alpha": 1.0, "stages": [{"stage_name": "a", "steps": 1, "losses": {"ce": 1.0}}]}, "no loss"),
        ({"stages": [NO_EFFECT]}, "no effect"),
    ),
)
def test_what_cannot_be_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
) -> None:
    teacher = inputs(tmp_path)
    monkeypatch.setattr(Recovery, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, teacher, **values)


def test_another_teachers_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match="found digest, expected other"):
        run(tmp_path, inputs(tmp_path), digest="other")


def test_a_student_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    teacher = inputs(tmp_path)
    path = tmp_path / "compress" / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    first, second = list(content["model"]["vocab"])[-2:]
    vocab = content["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(content))
    with pytest.raises(InputRejected, match="different tokenizers"):
        run(tmp_path, teacher)


@pytest.mark.parametrize("action", ["shared-core", "dense"])
def test_students_of_other_actions_are_trained_and_leave_a_plain_model(tmp_path: Path, action: str) -> None:
    teacher = inputs(tmp_path)
    changed = plan(KEPT).model_copy(update={"action": action, "shared_rank": 2 if action == "shared-core" else None})
    write_plan(tmp_path, changed)
    rows = torch.from_numpy(TokenRows.load(tmp_path / "profile" / "rows.safetensors").ids_NS)
    student = apply_plan(load_model(teacher), changed, Material(None, rows)).model
    with torch.no_grad():  # damage that a few steps can repair
        for name, parameter in student.named_parameters():
            if name.endswith(("output_wrapper.scale", "mlp.down_proj.weight")):
                parameter.mul_(-1)
    if is_shared_core(student):
        save_trainable(student, teacher, tmp_path / "compress" / TRAINABLE)
    save_student(plain_form(student), teacher, tmp_path / "compress" / "model")
    experts = [LrMultiplier(pattern=r"\.mlp\.", lr_multiplier=1.0), LrMultiplier(pattern=".*", lr_multiplier=0.0)]
    stages = [StageConfig(stage_name="experts", steps=8, learning_rate=0.02, parameter_lr_multipliers=experts)]
    summary, out = run(tmp_path, teacher, alpha=1.0, stages=stages), tmp_path / "out"
    assert summary.kept == "trained" and summary.after.kl_nats < summary.before.kl_nats
    plain = load_student(out / "model")
    with torch.no_grad():
        logits = plain(tiny_ids(vocab=VOCAB)).logits
    assert plain.config.model_type == ("qwen3" if action == "dense" else "qwen3_moe") and logits.isfinite().all()
    assert (out / TRAINABLE).is_dir() == (action == "shared-core")
    if action == "shared-core":
        with torch.no_grad():
            trainable = load_student(out / TRAINABLE)(tiny_ids(vocab=VOCAB)).logits
        assert float((trainable - logits).abs().max()) < 1e-5
