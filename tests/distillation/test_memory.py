"""Memory is asked for before anything is trained: the default recipe does without, the user's own is refused."""

from math import prod
from pathlib import Path
from typing import Any

import pytest

from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.config import BuildConfig, DistillConfig
from moe_edge.contracts.errors import ResourceProblem
from moe_edge.distillation import memory as distill_room
from moe_edge.models.students import load_student
from moe_edge.stages import distill
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.stages.test_distill import NORMS, digests, inputs


def context(tmp_path: Path, **values: Any) -> StageContext:
    settings = {"tokens": 512, "batch_rows": 2} | values
    config = BuildConfig.model_construct(distill=DistillConfig(**settings))
    folders = {name: tmp_path / name for name in ("profile", "plan", "compress")}
    return StageContext(config, inputs(tmp_path), "digest", tmp_path / "out", folders)


def own(**losses: float) -> list[dict[str, Any]]:
    stage = {"stage_name": "a", "steps": 2, "learning_rate": 0.01, "losses": losses}
    return [stage | {"parameter_lr_multipliers": NORMS}]


@pytest.mark.parametrize("share", [0.5, 2.0], ids=["weights", "optimizer"])
def test_without_memory_the_default_recipe_goes_on_untrained(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = context(tmp_path)
    parameters = _parameters(tmp_path / "compress" / "model")
    monkeypatch.setattr(distill_room, "free_bytes", lambda *_: int(share * 4 * parameters))
    summary = distill.run(run)
    word = "weights in float32" if share < 1 else "Adam's moments"
    assert not summary["trained"] and "no memory to train" in summary["reason"] and word in summary["reason"]
    assert digests(run.out / "model") == digests(tmp_path / "compress" / "model")


def test_the_users_own_stages_are_refused_but_frozen_weights_need_no_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = context(tmp_path, stages=own(kl=1.0))
    parameters = _parameters(tmp_path / "compress" / "model")
    monkeypatch.setattr(distill_room, "free_bytes", lambda *_: 2 * parameters)
    with pytest.raises(ResourceProblem, match="no memory to train"):
        distill.run(run)
    monkeypatch.setattr(distill_room, "free_bytes", lambda *_: 4 * parameters)
    assert distill.run(run)["trained"]  # the norms alone are trained


def test_a_teacher_that_does_not_fit_beside_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "fits_in_memory", lambda *_: False)
    monkeypatch.setattr("moe_edge.distillation.stage_parts.teacher_model", lambda *_: pytest.fail("loaded"))
    run = context(tmp_path)
    (stage,) = distill.run(run)["stages"]
    assert stage["teacher"] == "cached" and set(stage["first_and_last"]) == {"total_loss", "ce_loss", "kl_loss"}
    config = DistillConfig.model_validate({"stages": own(kl=1.0, cka=0.5)})
    with pytest.raises(ResourceProblem, match="does not fit in memory beside the student"):
        distill_room.recipe_with_room(config, fits=False)
    assert distill_room.recipe_with_room(config, fits=True) is config


def test_a_teacher_that_fits_is_asked_itself(tmp_path: Path) -> None:
    (stage,) = distill.run(context(tmp_path))["stages"]
    assert stage["teacher"] == "live"
    assert set(stage["first_and_last"]) == {"total_loss", "ce_loss", "kl_loss", "cka_loss"}


@pytest.mark.parametrize("spare", [-1, 0])
def test_training_and_teacher_are_asked_for_together(
    spare: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = context(tmp_path)
    student = load_student(tmp_path / "compress" / "model")
    state = 12 * sum(tensor.numel() for tensor in student.parameters())
    teacher = 4 * _parameters(run.teacher)
    monkeypatch.setattr(distill_room, "free_bytes", lambda *_: state + teacher + spare)
    (stage,) = distill.run(run)["stages"]
    assert stage["teacher"] == ("cached" if spare < 0 else "live")
    mine = context(tmp_path / "mine", stages=[{"stage_name": "a", "steps": 2, "losses": {"kl": 1.0, "cka": 0.5}}])
    if spare < 0:
        with pytest.raises(ResourceProblem, match="does not fit in memory beside the student"):
            distill.run(mine)
    else:
        assert distill.run(mine)["trained"]


def _parameters(folder: Path) -> int:
    return sum(prod(tensor.shape) for tensor in inspect_checkpoint(folder).tensors.values())
