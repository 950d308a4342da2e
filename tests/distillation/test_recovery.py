"""Stages in sequence, and resuming after a kill: the same bits as without one."""

import logging
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from moe_edge.contracts.config import DistillConfig, LrMultiplier, StageConfig
from moe_edge.contracts.errors import ConfigError, EnvironmentProblem, MoeEdgeError
from moe_edge.distillation import callbacks
from moe_edge.distillation.checkpoints import latest_checkpoint, load_weights, require_same_sharding
from moe_edge.distillation.recovery import Recovery, StageRecord
from moe_edge.distillation.signal import CachedSignal
from moe_edge.models.taps import decoder_layers
from tests.distillation.parts import killed_before, rows, schedules, tiny_student, tiny_teacher, write_cache

EXPERTS = [
    LrMultiplier(pattern=r"\.experts\.|mlp\.gate", lr_multiplier=1.0),
    LrMultiplier(pattern=".*", lr_multiplier=0.0),
]
Trained = tuple[dict[str, torch.Tensor], list[StageRecord]]
CONFIG = DistillConfig(
    batch_rows=2,
    stages=[
        StageConfig(stage_name="experts", steps=3, parameter_lr_multipliers=EXPERTS, learning_rate=0.01),
        StageConfig(stage_name="all", steps=4, learning_rate=0.003),
    ],
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    model = tiny_teacher()
    model.save_pretrained(folder / "teacher")
    write_cache(folder / "logits.h5", model, rows())
    return folder / "teacher"


@pytest.fixture(scope="module")
def straight(teacher: Path) -> Trained:
    """What an uninterrupted run ends with; its checkpoints stay in `straight`."""
    return train(recovery(teacher, "straight", interval_s=1e9))


def recovery(teacher: Path, name: str, interval_s: float = 0.0, config: DistillConfig = CONFIG) -> Recovery:
    signal = CachedSignal(teacher.parent / "logits.h5", {})
    return Recovery(config, rows(), signal, 96, teacher, teacher.parent / name, interval_s)


def train(work: Recovery, student: PreTrainedModel | None = None) -> Trained:
    student = tiny_student() if student is None else student
    records = work.train(student, schedules(work.config))
    return student.state_dict(), records


def test_stages_train_what_they_say(teacher: Path, straight: Trained) -> None:
    before, (after, records) = tiny_student().state_dict(), straight
    assert [record.steps for record in records] == [3, 4]
    assert [record.tokens for record in records] == [96, 128]
    assert all({"total_loss", "ce_loss", "kl_loss", "cka_loss"} <= set(entry) for r in records for entry in r.log)
    assert all(bool((after[name] != before[name]).any()) for name in before)
    finished = tiny_student()
    load_weights(finished, latest_checkpoint(teacher.parent / "straight" / "0-experts"))
    for name, tensor in finished.state_dict().items():
        frozen = ".experts." not in name and "mlp.gate" not in name
        assert torch.equal(tensor, before[name]) == frozen, name


def test_without_the_clock_only_the_last_step_is_saved(teacher: Path, straight: object) -> None:
    for stage, steps in (("0-experts", 3), ("1-all", 4)):
        names = [path.name for path in (teacher.parent / "straight" / stage).iterdir()]
        assert names == [f"checkpoint-{steps}"]


@pytest.mark.parametrize(("stage_steps", "step"), ((3, 2), (4, 0), (4, 3)))
def test_a_kill_changes_no_bit(
    teacher: Path,
    straight: Trained,
    stage_steps: int,
    step: int,
) -> None:
    name = f"killed-{stage_steps}-{step}"
    with killed_before(step, stage_steps):
        train(recovery(teacher, name))
    resumed, records = train(recovery(teacher, name))
    assert records == straight[1]
    for key, tensor in straight[0].items():
        assert torch.equal(resumed[key], tensor), key


def layer_passes(student: PreTrainedModel) -> Counter[int]:
    """Counts from now on how often each decoder layer runs: transformers keeps a layer's own hooks out of the second run."""
    passes: Counter[int] = Counter()
    for index, layer in enumerate(decoder_layers(student)):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: passes.update([index]))
    return passes


def test_gradient_checkpointing_runs_the_layers_again_and_changes_no_loss(teacher: Path, straight: Trained) -> None:
    config = CONFIG.model_copy(update={"gradient_checkpointing": True})
    passes = layer_passes(student := tiny_student())
    state, records = train(recovery(teacher, "recomputed", 1e9, config), student)
    assert passes == dict.fromkeys(range(3), 2 * (3 + 4))  # one micro-batch a step, run twice
    passes = layer_passes(student := tiny_student())
    one_step = [stage.model_copy(update={"steps": 1}) for stage in CONFIG.stages]
    train(recovery(teacher, "kept", 1e9, CONFIG.model_copy(update={"stages": one_step})), student)
    assert passes == dict.fromkeys(range(3), 2)  # two stages of one step, run once
    for record, plain in zip(records, straight[1], strict=True):
        losses = [[entry[name] for name in entry if name.endswith("_loss")] for entry in record.log]
        expected = [[entry[name] for name in entry if name.endswith("_loss")] for entry in plain["log"]]
        assert losses == [pytest.approx(values, rel=1e-5) for values in expected]
    for name, tensor in straight[0].items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)


def test_parts_of_the_blend_that_are_far_apart_are_mentioned_once_per_stage(
    teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="moe_edge.distillation.callbacks"):
        train(recovery(teacher, "near", 1e9), tiny_teacher())  # nothing to learn: its KL is next to nothing
        said = [record.message for record in caplog.records if record.name == "moe_edge.distillation.callbacks"]
        assert len(said) == 2 and all("far above kl_loss" in line and "a larger distill.alpha" in line for line in said)
        caplog.clear()
        alone = [stage.model_copy(update={"losses": {"kl": 1.0}}) for stage in CONFIG.stages]
        train(recovery(teacher, "alone", 1e9, CONFIG.model_copy(update={"stages": alone})))
        assert not [record for record in caplog.records if record.name == "moe_edge.distillation.callbacks"]


def test_a_checkpoint_without_its_marker_does_not_count(teacher: Path, straight: Trained, tmp_path: Path) -> None:
    shutil.copytree(teacher.parent / "straight", teacher.parent / "torn")
    (latest_checkpoint(teacher.parent / "torn" / "1-all") / "complete").unlink()
    resumed, _ = train(recovery(teacher, "torn"))
    assert all(torch.equal(resumed[name], straight[0][name]) for name in resumed)


def test_a_foreign_checkpoint_is_refused(teacher: Path, straight: object) -> None:
    with pytest.raises(MoeEdgeError, match="does not fit"):
        load_weights(tiny_student("qwen2_moe"), latest_checkpoint(teacher.parent / "straight" / "1-all"))


def test_sharded_training_does_not_go_on_unsharded(teacher: Path, straight: object) -> None:
    checkpoint = latest_checkpoint(teacher.parent / "straight" / "1-all")
    assert checkpoint is not None
    require_same_sharding(checkpoint, sharded=False)
    with pytest.raises(ConfigError, match="sharded weights cannot go on without"):
        require_same_sharding(checkpoint, sharded=True)


def test_tensorboard_events_or_a_clear_word(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = recovery(teacher, "events/checkpoints")
    work = replace(work, config=CONFIG.model_copy(update={"tensorboard": True}))
    stages = schedules(CONFIG)
    monkeypatch.setattr(callbacks, "find_spec", lambda _: None)
    with pytest.raises(
        EnvironmentProblem, match=r"(?s)tensorboard is not installed.*pip install 'moe-edge\[tensorboard\]'"
    ):
        work.check(tiny_student(), stages)
    monkeypatch.undo()
    pytest.importorskip("tensorboard", reason="tensorboard is optional")
    work.check(tiny_student(), stages)
    work.train(tiny_student(), stages)
    assert list((teacher.parent / "events" / "tensorboard").glob("all/events.*"))


def test_bfloat16_products_give_about_the_same_losses(teacher: Path, straight: Trained) -> None:
    config = CONFIG.model_copy(update={"precision": "bfloat16"})
    _, records = train(replace(recovery(teacher, "bfloat16", interval_s=1e9), config=config))
    exact = [entry["kl_loss"] for record in straight[1] for entry in record.log]
    rough = [entry["kl_loss"] for record in records for entry in record.log]
    assert rough != exact and rough == pytest.approx(exact, rel=0.1)
