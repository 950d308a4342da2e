"""A student that the user brings: dense or a mixture, the teacher's tokenizer or another, through the command line."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from moe_edge import api as building
from moe_edge.api import Request
from moe_edge.cli import main as cli
from moe_edge.contracts.errors import ConfigError, InputRejected, ResourceProblem
from moe_edge.distillation.capture import CaptureConfig
from moe_edge.distillation.capture_run import CaptureRequest, capture
from moe_edge.models.loading import load_tokenizer, resolve_teacher
from moe_edge.models.students import load_student
from moe_edge.stages import distill_pair
from tests.tiny import TEXTS, tiny_checkpoint, tiny_tokenizer

TOKENS = 32
STAGE: dict[str, Any] = {"stage_name": "all", "steps": 6, "learning_rate": 0.01}
ACROSS = STAGE | {"losses": {"projected_kl": 1.0}, "alpha": 1.0}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 12))
    return path


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path, "mixtral", name="teacher")


def dense(folder: Path, tokenizer: PreTrainedTokenizerFast, layers: int = 1) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 8, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, eos_token_id=2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def without_stages(teacher: Path, tmp_path: Path, text: Path) -> Request:
    wanted = request(teacher, tmp_path / "out", text)
    return replace(wanted, settings=[one for one in wanted.settings if "stages" not in one])


@pytest.mark.parametrize("merges", [280, 320])
def test_without_stages_every_pair_has_a_recipe(merges: int, teacher: Path, text: Path, tmp_path: Path) -> None:
    student = dense(tmp_path / "student", tiny_tokenizer(merges))
    _, summary = building.distill_student(without_stages(teacher, tmp_path, text), str(student))
    losses = {"ce_loss", "projected_kl_loss"} if merges == 280 else {"ce_loss", "kl_loss", "cka_loss"}
    (stage,) = summary["stages"]
    assert losses <= set(stage["first_and_last"]) and summary["kept"] == "trained"
    assert stage["teacher"] == ("none" if merges == 280 else "live")


@pytest.mark.parametrize("merges", [280, 320])
def test_a_teacher_that_does_not_fit_teaches_from_the_cache_or_not_at_all(
    merges: int, teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill_pair, "fits_in_memory", lambda *_: False)
    student, wanted = dense(tmp_path / "student", tiny_tokenizer(merges)), without_stages(teacher, tmp_path, text)
    if merges == 280:
        with pytest.raises(ResourceProblem, match="does not fit in memory beside the student"):
            building.distill_student(wanted, str(student))
        return
    monkeypatch.setattr("moe_edge.distillation.stage_parts.teacher_model", lambda *_: pytest.fail("loaded"))
    _, summary = building.distill_student(wanted, str(student))
    assert set(summary["stages"][0]["first_and_last"]) == {"total_loss", "ce_loss", "kl_loss"}
    assert summary["kept"] == "trained" and "does not fit" in summary["cka"]


def test_an_edited_text_is_noticed(teacher: Path, text: Path, tmp_path: Path) -> None:
    student = dense(tmp_path / "student", tiny_tokenizer())
    mine = tmp_path / "mine.jsonl"
    mine.write_text(text.read_text())
    wanted = request(teacher, tmp_path / "out", mine, STAGE | {"losses": {"kl": 1.0}})
    building.distill_student(wanted, str(student))
    first = json.loads((tmp_path / "out/distill/manifest.json").read_text())["key"]
    mine.write_text(text.read_text() + json.dumps({"text": "One more line of text."}) + "\n")
    building.distill_student(wanted, str(student))
    assert json.loads((tmp_path / "out/distill/manifest.json").read_text())["key"] != first


def request(teacher: Path, out: Path, text: Path | str, *stages: dict[str, Any]) -> Request:
    settings = [
        f"distill.data={text}", f"distill.stages={json.dumps(stages or [STAGE])}", "distill.tokens=800",
        f"calibration.sequence_length={TOKENS}", "distill.batch_rows=2",
    ]  # fmt: skip
    return Request("cpu", str(teacher), None, out, settings=settings)


def test_a_dense_student_with_another_tokenizer_learns_and_is_found_done(
    teacher: Path, text: Path, tmp_path: Path
) -> None:
    student = dense(tmp_path / "student", tiny_tokenizer(280))
    wanted = request(teacher, tmp_path / "out", text, ACROSS)
    out, summary = building.distill_student(wanted, str(student))
    assert summary["kept"] == "trained" and summary["held_out_kl"].startswith("projected_kl")
    assert 0 < summary["after"]["projected_kl_nats"] < summary["before"]["projected_kl_nats"]
    assert summary["before"]["cka_mean"] is None and "tokenizers differ" in summary["cka"]
    log = [json.loads(line) for line in (out / "distill/train_log.jsonl").read_text().splitlines()]
    assert len(log) == 6 and 0 < log[0]["projected_kl_places"] < 1
    trained = load_student(out / "distill/model")
    assert trained.config.model_type == "qwen3" and len(load_tokenizer(out / "distill/model")) == 280
    assert not torch.equal(trained.model.norm.weight, load_student(student).model.norm.weight)
    written = (out / "distill/manifest.json").stat().st_mtime_ns
    assert building.distill_student(wanted, str(student))[1] == summary
    assert (out / "distill/manifest.json").stat().st_mtime_ns == written


def test_losses_that_compare_token_by_token_are_refused_with_another_tokenizer(
    teacher: Path, text: Path, tmp_path: Path
) -> None:
    student = dense(tmp_path / "student", tiny_tokenizer(280))
    with pytest.raises(InputRejected, match="(?s)different tokenizers.*projected_kl"):
        building.distill_student(request(teacher, tmp_path / "out", text), str(student))


def test_a_capture_cannot_teach_other_tokens(teacher: Path, text: Path, tmp_path: Path) -> None:
    capture(CaptureRequest(teacher, str(text), 800, CaptureConfig(k=16), TOKENS), tmp_path / "capture")
    student = dense(tmp_path / "student", tiny_tokenizer(280))
    with pytest.raises(ConfigError, match="holds the teacher's tokens"):
        building.distill_student(request(teacher, tmp_path / "out", tmp_path / "capture", ACROSS), str(student))
    same = dense(tmp_path / "same", tiny_tokenizer())
    stage = STAGE | {"losses": {"kl": 1.0}, "alpha": 1.0}
    _, summary = building.distill_student(request(teacher, tmp_path / "out", tmp_path / "capture", stage), str(same))
    assert summary["after"]["kl_nats"] < summary["before"]["kl_nats"]


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_a_student_of_another_shape_takes_every_loss_on_the_same_tokens(
    kind: str, teacher: Path, text: Path, tmp_path: Path
) -> None:
    student = dense(tmp_path / "dense", tiny_tokenizer())
    if kind == "mixture":
        student = tiny_checkpoint(tmp_path, "olmoe", name="olmoe", experts=4, layers=1, hidden=32, seed=3)
    losses = {"ce": 1.0, "kl": 1.0, "cka": 0.5, "projected_kl": 0.5}
    stage = STAGE | {"losses": losses, "layer_map": "auto", "alpha": 0.9}
    out, summary = building.distill_student(request(teacher, tmp_path / "out", text, stage), str(student))
    assert summary["after"]["kl_nats"] < summary["before"]["kl_nats"]
    assert len(summary["after"]["cka_by_layer"]) == 1
    (stage_summary,) = summary["stages"]
    assert {f"{name}_loss" for name in losses} < set(stage_summary["first_and_last"])
    assert not (out / "distill/logits").exists() and not (out / "distill/checkpoints").exists()


def test_a_student_that_training_harms_comes_out_as_it_was(teacher: Path, text: Path, tmp_path: Path) -> None:
    student = dense(tmp_path / "student", tiny_tokenizer())
    ruinous = STAGE | {"learning_rate": 50.0, "losses": {"kl": 1.0}}
    out, summary = building.distill_student(request(teacher, tmp_path / "out", text, ruinous), str(student))
    assert summary["kept"] == "untrained"
    before, after = load_student(student).state_dict(), load_student(out / "distill/model").state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_bad_requests_are_refused(teacher: Path, text: Path, tmp_path: Path) -> None:
    student = dense(tmp_path / "student", tiny_tokenizer())
    with pytest.raises(ConfigError, match="the student is not a folder"):
        resolve_teacher("/no/such/folder", role="student")
    empty = request(teacher, tmp_path / "out", text)
    empty = Request("cpu", str(teacher), None, tmp_path / "out", settings=[*empty.settings, "distill.stages=[]"])
    with pytest.raises(ConfigError, match="nothing to train"):
        building.distill_student(empty, str(student))
    strangers = request(teacher, tmp_path / "out", text, STAGE | {"losses": {"kl": 1.0, "routing_kl": 1.0}})
    with pytest.raises(ConfigError, match="its experts are its own"):
        building.distill_student(strangers, str(student))
    (tmp_path / "run/compress").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds a build"):
        building.distill_student(request(teacher, tmp_path / "run", text), str(student))


def test_the_command_says_what_to_do_next(
    teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = dense(tmp_path / "student", tiny_tokenizer(280))
    settings = request(teacher, tmp_path / "out", text, ACROSS).settings
    arguments = ["distill", str(teacher), "--student", str(student), "--out", str(tmp_path / "out")]
    arguments += [part for setting in settings for part in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["moe-edge", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "trained; held-out KL fell" in out
    assert f"moe-edge export {tmp_path / 'out/distill/model'}" in out
