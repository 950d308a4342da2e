"""A student that the user brings: dense or a mixture, the teacher's tokenizer or another, through the API and the command."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_edge import api
from moe_edge.cli import main as cli
from moe_edge.contracts.artifacts import DistillFolder
from moe_edge.contracts.errors import ConfigError, InputRejected, ResourceProblem
from moe_edge.distillation.capture import CaptureConfig
from moe_edge.distillation.capture_run import CaptureRequest, capture
from moe_edge.models.loading import load_tokenizer, resolve_teacher
from moe_edge.models.students import load_student
from moe_edge.process import placement
from tests.distillation.parts import dense_student, teacher_of
from tests.tiny import TEXTS, tiny_checkpoint, tiny_tokenizer

TOKENS = 32
OTHER, SAME = 280, 320  # tokens of a tokenizer; the teacher's has 320
STAGE: dict[str, Any] = {"stage_name": "all", "steps": 6, "learning_rate": 0.01}
ACROSS = STAGE | {"losses": {"projected_kl": 1.0}, "alpha": 1.0}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 12))
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("pair"), "mixtral", name="teacher")


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the size of their tokenizer."""
    folder = tmp_path_factory.mktemp("students")
    return {size: dense_student(folder / str(size), tiny_tokenizer(size)) for size in (OTHER, SAME)}


def settings(text: Path, stages: list[dict[str, Any]] | str) -> list[str]:
    return [
        f"distill.data={text}",
        f"distill.stages={json.dumps(stages)}",
        "distill.tokens=800",
        f"calibration.sequence_length={TOKENS}",
        "distill.batch_rows=2",
    ]


def teach(teacher: Path, student: Path, out: Path, text: Path, *stages: dict[str, Any]) -> DistillFolder:
    """Without stages: `auto`."""
    return api.distill(teacher, student=student, out=out, settings=settings(text, list(stages) or "auto"))


@pytest.mark.parametrize("size", [OTHER, SAME])
def test_without_stages_every_pair_has_a_recipe(
    size: int, teacher: Path, students: dict[int, Path], text: Path, tmp_path: Path
) -> None:
    taught = teach(teacher, students[size], tmp_path / "out", text)
    losses = {"ce_loss", "projected_kl_loss"} if size == OTHER else {"ce_loss", "kl_loss", "cka_loss"}
    (stage,) = taught.summary.stages
    assert losses <= set(stage.first_and_last) and taught.summary.kept == "trained"
    assert stage.teacher == ("none" if size == OTHER else "live")
    (kept,) = json.loads(taught.recipe.read_text())["stages"]
    assert f"{kept['teacher']} {kept['layer_map']}" == "live proportional"


@pytest.mark.parametrize("size", [OTHER, SAME])
def test_a_teacher_that_does_not_fit_teaches_from_the_cache_or_not_at_all(
    size: int, teacher: Path, students: dict[int, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "fits_in_memory", lambda *_: False)
    if size == OTHER:
        with pytest.raises(ResourceProblem, match="does not fit in memory beside the student"):
            teach(teacher, students[size], tmp_path / "out", text)
        return
    monkeypatch.setattr("moe_edge.distillation.stage_parts.teacher_model", lambda *_: pytest.fail("loaded"))
    summary = teach(teacher, students[size], tmp_path / "out", text).summary
    assert set(summary.stages[0].first_and_last) == {"total_loss", "ce_loss", "kl_loss"}
    assert summary.kept == "trained" and "does not fit" in summary.cka


def test_without_memory_to_train_nothing_is_pretended(
    teacher: Path, students: dict[int, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build goes on with its untrained student; whoever brings one has asked for its training."""
    monkeypatch.setattr("moe_edge.distillation.memory.free_bytes", lambda *_: 1000)
    with pytest.raises(ResourceProblem, match="(?s)no memory to train.*weights in float32"):
        teach(teacher, students[SAME], tmp_path / "out", text)
    assert not (tmp_path / "out/distill/manifest.json").exists()


def test_an_edited_text_is_noticed(teacher: Path, students: dict[int, Path], text: Path, tmp_path: Path) -> None:
    mine, keys = tmp_path / "mine.jsonl", []
    for more in ("", json.dumps({"text": "One more line of text."}) + "\n"):
        mine.write_text(text.read_text() + more)
        teach(teacher, students[SAME], tmp_path / "out", mine, STAGE | {"steps": 1, "losses": {"kl": 1.0}})
        keys.append(json.loads((tmp_path / "out/distill/manifest.json").read_text())["key"])
    assert keys[0] != keys[1]


def test_a_dense_student_with_another_tokenizer_learns_and_is_found_done(
    teacher: Path, students: dict[int, Path], text: Path, tmp_path: Path
) -> None:
    taught = teach(teacher, students[OTHER], tmp_path / "out", text, ACROSS)
    summary, out = taught.summary, taught.path
    assert summary.kept == "trained" and summary.held_out_kl.startswith("projected_kl")
    assert 0 < summary.after.projected_kl_nats < summary.before.projected_kl_nats
    assert summary.before.cka_mean is None and "tokenizers differ" in summary.cka
    log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert len(log) == 6 and 0 < log[0]["projected_kl_places"] < 1
    trained = load_student(taught.model)
    assert trained.config.model_type == "qwen3" and len(load_tokenizer(taught.model)) == OTHER
    assert not torch.equal(trained.model.norm.weight, load_student(students[OTHER]).model.norm.weight)
    written = (out / "manifest.json").stat().st_mtime_ns
    assert teach(teacher, students[OTHER], tmp_path / "out", text, ACROSS).summary == summary
    assert (out / "manifest.json").stat().st_mtime_ns == written


def test_losses_that_compare_token_by_token_are_refused_with_another_tokenizer(
    teacher: Path, students: dict[int, Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputRejected, match="(?s)different tokenizers.*projected_kl"):
        teach(teacher, students[OTHER], tmp_path / "out", text, STAGE)


def test_a_capture_cannot_teach_other_tokens(
    teacher: Path, students: dict[int, Path], text: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "capture"
    capture(CaptureRequest(teacher_of(teacher), str(text), 800, CaptureConfig(k=16), TOKENS), kept)
    with pytest.raises(ConfigError, match="holds the teacher's tokens"):
        teach(teacher, students[OTHER], tmp_path / "out", kept, ACROSS)
    stage = STAGE | {"losses": {"kl": 1.0}, "alpha": 1.0}
    summary = teach(teacher, students[SAME], tmp_path / "out", kept, stage).summary
    assert summary.after.kl_nats < summary.before.kl_nats


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_a_student_of_another_shape_takes_every_loss_on_the_same_tokens(
    kind: str, teacher: Path, students: dict[int, Path], text: Path, tmp_path: Path
) -> None:
    student = students[SAME]
    if kind == "mixture":
        student = tiny_checkpoint(tmp_path, "olmoe", name="olmoe", experts=4, layers=1, hidden=32, seed=3)
    losses = {"ce": 1.0, "kl": 1.0, "cka": 0.5, "projected_kl": 0.5}
    taught = teach(
        teacher, student, tmp_path / "out", text, STAGE | {"losses": losses, "layer_map": "auto", "alpha": 0.9}
    )
    assert taught.summary.after.kl_nats < taught.summary.before.kl_nats
    assert len(taught.summary.after.cka_by_layer) == 1
    (stage,) = taught.summary.stages
    assert {f"{name}_loss" for name in losses} < set(stage.first_and_last)
    assert not (taught.path / "logits").exists() and not (taught.path / "checkpoints").exists()


def test_a_student_that_training_harms_comes_out_as_it_was(
    teacher: Path, students: dict[int, Path], text: Path, tmp_path: Path
) -> None:
    ruinous = STAGE | {"learning_rate": 50.0, "losses": {"kl": 1.0}}
    taught = teach(teacher, students[SAME], tmp_path / "out", text, ruinous)
    assert taught.summary.kept == "untrained"
    before, after = load_student(students[SAME]).state_dict(), load_student(taught.model).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_bad_requests_are_refused(teacher: Path, students: dict[int, Path], text: Path, tmp_path: Path) -> None:
    student, out = students[SAME], tmp_path / "out"
    with pytest.raises(ConfigError, match="the student is not a folder"):
        resolve_teacher("/no/such/folder", role="student")
    with pytest.raises(ConfigError, match="nothing to train"):
        api.distill(teacher, student=student, out=out, settings=settings(text, []))
    with pytest.raises(ConfigError, match="its experts are its own"):
        teach(teacher, student, out, text, STAGE | {"losses": {"kl": 1.0, "routing_kl": 1.0}})
    (tmp_path / "run/compress").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds a build"):
        teach(teacher, student, tmp_path / "run", text, STAGE)


def test_the_command_says_what_to_do_next(
    teacher: Path,
    students: dict[int, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["distill", str(teacher), "--student", str(students[OTHER]), "--out", str(tmp_path / "out")]
    arguments += [part for setting in settings(text, [ACROSS]) for part in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["moe-edge", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "trained; held-out KL fell" in out
    assert f"moe-edge export {tmp_path / 'out/distill/model'}" in out
