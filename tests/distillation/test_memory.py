"""Memory is asked for before anything is trained: the default stages do without, the user's own are refused; decided once."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from moe_edge.api import configure
from moe_edge.contracts.errors import ResourceProblem
from moe_edge.distillation import recovery
from moe_edge.distillation.checkpoints import SaveByTheClock
from moe_edge.models.students import load_student
from moe_edge.process import placement
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.distillation.parts import killed_before
from tests.distillation.stage import NORMS, TOKENS, digests, inputs, run, run_with

AUTO: dict[str, Any] = {"stages": "auto", "tokens": 4 * TOKENS * 2}  # four steps
MUCH = 1 << 40


def own(**losses: float) -> list[dict[str, Any]]:
    stage = {"stage_name": "a", "steps": 2, "learning_rate": 0.01, "losses": losses}
    return [stage | {"parameter_lr_multipliers": NORMS}]


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """So many bytes of memory are free, whoever asks."""
    for module in ("moe_edge.process.placement", "moe_edge.distillation.memory"):
        monkeypatch.setattr(f"{module}.free_bytes", lambda *_: count)


def parameters(folder: Path) -> int:
    return sum(prod(tensor.shape) for tensor in inspect_checkpoint(folder).tensors.values())


@pytest.mark.parametrize("share", [0.5, 2.0], ids=["weights", "optimizer"])
def test_without_memory_the_default_recipe_goes_on_untrained(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = inputs(tmp_path)
    free(monkeypatch, int(share * 4 * parameters(tmp_path / "compress" / "model")))
    summary = run(tmp_path, teacher, **AUTO)
    word = "weights in float32" if share < 1 else "Adam's moments"
    assert not summary.trained and "no memory to train" in summary.reason and word in summary.reason
    assert digests(tmp_path / "out" / "model") == digests(tmp_path / "compress" / "model")


def test_the_users_own_stages_are_refused_but_frozen_weights_need_no_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = inputs(tmp_path)
    count = parameters(tmp_path / "compress" / "model")
    free(monkeypatch, 2 * count)
    with pytest.raises(ResourceProblem, match="no memory to train"):
        run(tmp_path, teacher, stages=own(kl=1.0))
    free(monkeypatch, 4 * count)
    assert run(tmp_path, teacher, stages=own(kl=1.0)).trained  # the norms alone are trained


def test_a_teacher_that_does_not_fit_beside_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "fits_in_memory", lambda *_: False)
    monkeypatch.setattr("moe_edge.distillation.stage_parts.teacher_model", lambda *_: pytest.fail("loaded"))
    teacher = inputs(tmp_path)
    (stage,) = run(tmp_path, teacher, **AUTO).stages
    assert stage.teacher == "cached" and set(stage.first_and_last) == {"total_loss", "ce_loss", "kl_loss"}
    with pytest.raises(ResourceProblem, match="does not fit in memory beside the student"):
        run(tmp_path, teacher, out="own", stages=own(kl=1.0, cka=0.5))


@pytest.mark.parametrize("spare", [-1, 0])
def test_training_and_teacher_are_asked_for_together(
    spare: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = inputs(tmp_path)
    student = load_student(tmp_path / "compress" / "model")
    state = 12 * sum(tensor.numel() for tensor in student.parameters())
    free(monkeypatch, state + 4 * parameters(teacher) + spare)
    (stage,) = run(tmp_path, teacher, **AUTO).stages
    assert stage.teacher == ("cached" if spare < 0 else "live") and ("cka_loss" in stage.first_and_last) == (spare == 0)
    mine = [{"stage_name": "a", "steps": 2, "losses": {"kl": 1.0, "cka": 0.5}}]
    if spare < 0:
        with pytest.raises(ResourceProblem, match="does not fit in memory beside the student"):
            run(tmp_path, teacher, out="mine", stages=mine)
    else:
        assert run(tmp_path, teacher, out="mine", stages=mine).trained


@pytest.fixture
def large_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of 32 experts, its student of one: the weights of the teacher outweigh a training. A checkpoint after every step."""
    monkeypatch.setattr(recovery, "SaveByTheClock", lambda _: SaveByTheClock(0.0))
    return inputs(tmp_path, kept={0: [0], 1: [1]}, experts=32, top_k=1, width=64)


@pytest.mark.parametrize(("first", "then"), [("much", "little"), ("little", "much")])
def test_a_resume_goes_on_as_it_began_whatever_memory_is_free(
    first: str, then: str, large_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"much": MUCH, "little": int(1.4 * 4 * parameters(large_teacher))}  # too little to begin with, by its rule
    free(monkeypatch, sizes[first])
    straight = run(tmp_path, large_teacher, out="straight", **AUTO)
    assert [stage.teacher for stage in straight.stages] == ["live" if first == "much" else "cached"]
    assert (straight.before.cka_mean is not None) == (first == "much")
    with killed_before(2):
        run(tmp_path, large_teacher, **AUTO)
    decided = {name: (tmp_path / "out" / name).read_bytes() for name in ("recipe.json", ".placement.json")}
    free(monkeypatch, sizes[then])
    run(tmp_path, large_teacher, **AUTO)
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in decided} == decided
    (stage,) = json.loads(decided["recipe.json"])["stages"]
    assert ("cka" in stage["losses"]) == (first == "much")


def test_a_resume_that_cannot_go_on_as_it_began_is_refused(
    large_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = parameters(tmp_path / "compress" / "model")
    free(monkeypatch, MUCH)
    run(tmp_path, large_teacher, out="straight", **AUTO)
    with killed_before(2):
        run(tmp_path, large_teacher, **AUTO)
    shortages = {
        4 * student - 1: "student's weights",
        12 * student - 1: "Adam's moments",
        4 * parameters(large_teacher) + 12 * student - 1: "the teacher and the training",
    }
    for count, word in shortages.items():
        free(monkeypatch, count)
        with pytest.raises(ResourceProblem, match=f"(?s)less memory than when this training began.*{word}") as refusal:
            run(tmp_path, large_teacher, **AUTO)
        assert refusal.value.exit_code == 6
    free(monkeypatch, MUCH)
    run(tmp_path, large_teacher, **AUTO)
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")


def test_the_saved_configuration_behaves_as_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a build writes as config.yaml, given back with --config: still the default stages, which do with less."""
    teacher = inputs(tmp_path)
    first = configure("cpu", settings=[f"distill.tokens={AUTO['tokens']}", f"calibration.sequence_length={TOKENS}"])
    with (tmp_path / "config.yaml").open("w") as file:
        YAML(typ="safe").dump(first.model_dump(mode="json", by_alias=True), file)
    again = configure("cpu", config=tmp_path / "config.yaml")
    assert again == first and again.distill.stages == "auto"
    for share, trained in ((2, False), (15, True)):  # not even the weights fit; everything but the teacher does
        free(monkeypatch, share * parameters(tmp_path / "compress" / "model"))
        runs = [
            run_with(config, tmp_path, teacher, out=f"{share}-{number}") for number, config in enumerate((first, again))
        ]
        assert [summary.trained for summary in runs] == [trained] * 2 and runs[0].reason == runs[1].reason
        assert digests(tmp_path / f"{share}-0") == digests(tmp_path / f"{share}-1")
