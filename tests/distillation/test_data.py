"""distill.data: captures of draws, imported caches, and data sets of the `datasets` library, through the distill stage."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest

from moe_edge.cli import main as cli
from moe_edge.contracts.artifacts import DistillSummary
from moe_edge.contracts.config import StageConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.capture import CaptureConfig, captured_signal
from moe_edge.distillation.recovery import Recovery
from moe_edge.storage.rows import TokenRows
from tests.distillation.parts import dense_student, teacher_of
from tests.distillation.stage import NORMS, TOKENS, VOCAB, inputs, run
from tests.tiny import TEXTS, TOKENIZER_SIZE, tiny_checkpoint, tiny_ids, tiny_tokenizer

KL_ONLY = StageConfig(
    stage_name="all", steps=8, learning_rate=0.05, parameter_lr_multipliers=NORMS, losses={"kl": 1.0}, alpha=1.0
)


def captured(tmp_path: Path, teacher: Path, config: CaptureConfig, name: str = "capture") -> Path:
    """A capture of twelve rows that the profile does not know."""
    rows = TokenRows(tiny_ids(TOKENS, 12, VOCAB).numpy().astype("int32")[:, ::-1].copy(), 12 * TOKENS)
    captured_signal(teacher_of(teacher), rows, tmp_path / name, config).close()
    return tmp_path / name


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """The command line in this process: its exit code and what it says."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moe-edge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    handler = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, handler)


def test_a_capture_of_draws_teaches_at_the_temperature_of_its_draws(tmp_path: Path) -> None:
    teacher = inputs(tmp_path)
    capture = captured(tmp_path, teacher, CaptureConfig(draws=50, temperatures=(1.0,)))
    summary = run(tmp_path, teacher, digest=None, data=str(capture), stages=[KL_ONLY])
    assert summary.kept == "trained" and 0 < summary.after.kl_nats < summary.before.kl_nats
    assert summary.held_out_kl.startswith("50 draws per token")


@pytest.mark.parametrize(
    ("config", "temperature", "words"),
    [
        (CaptureConfig(draws=50, temperatures=(1.0,)), 2.0, "made at T = 1.*set distill.temperature=1 and no other"),
        (CaptureConfig(draws=50, temperatures=(2.0,)), 2.0, "made at T = 2.*again with --rs 50 --temperatures 1$"),
        (CaptureConfig(k=8, temperatures=(1.0, 1.5)), 2.0, "stored for 1,1.5 only.*again with --temperatures 1,1.5,2$"),
    ],
)
def test_a_capture_without_the_temperature_says_what_to_do(
    tmp_path: Path, config: CaptureConfig, temperature: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = inputs(tmp_path)
    capture = captured(tmp_path, teacher, config)
    monkeypatch.setattr(Recovery, "train", lambda *_: pytest.fail("trained"))
    values = {"data": str(capture), "stages": [KL_ONLY], "temperature": temperature}
    with pytest.raises(ConfigError, match=f"(?s)is not in the capture.*distill.data: .*{words}"):
        run(tmp_path, teacher, digest=None, **values)


def test_an_import_without_tail_teaches_too(tmp_path: Path, called: Callable[..., Any]) -> None:
    """Out of our cache and back through the command line, the tail dropped on the way as other tools drop it."""
    teacher = inputs(tmp_path)
    capture = captured(tmp_path, teacher, CaptureConfig(k=16, temperatures=(1.0,)))
    code, out, _ = called("logits", "export", capture, tmp_path / "plain.h5")
    assert code == 0 and json.loads(out)["rows"] == 12
    with h5py.File(tmp_path / "plain.h5", "a") as file:
        for name in [name for name in file if name not in ("values", "indices", "input_ids")]:
            del file[name]
        for name in list(file.attrs):
            del file.attrs[name]
    code, out, _ = called("logits", "import", tmp_path / "plain.h5", tmp_path / "back", "--teacher", teacher)
    assert code == 0 and json.loads(out)["tail"].startswith("missing")
    values = {"data": str(tmp_path / "back"), "stages": [KL_ONLY], "temperature": 2.0}  # exact at every temperature
    summary = run(tmp_path, teacher, digest=None, **values)
    assert summary.kept == "trained" and 0 < summary.after.kl_nats < summary.before.kl_nats
    assert summary.held_out_kl.startswith("cached top-16 without its tail")


def test_what_cannot_go_out_or_come_in_has_its_code(tmp_path: Path, called: Callable[..., Any]) -> None:
    teacher = inputs(tmp_path)
    capture = captured(tmp_path, teacher, CaptureConfig(draws=9, temperatures=(1.0,)))
    code, out, err = called("logits", "export", capture, tmp_path / "plain.h5")
    assert code == 4 and "random draws" in err and not out
    code, _, err = called("logits", "import", tmp_path / "none.h5", tmp_path / "back", "--teacher", teacher)
    assert code in (2, 4) and "none.h5" in err and "Traceback" not in err


def test_a_split_of_a_local_data_set_is_captured_and_learnt_from(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    teacher = inputs(tmp_path, vocab=TOKENIZER_SIZE)
    data = tmp_path / "data"
    data.mkdir()
    lines = [{"text": f"{TEXTS[index % 4]} number {index}"} for index in range(60)]
    (data / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (data / "test.jsonl").write_text(json.dumps({"text": "too little"}) + "\n")

    def learn(split: str) -> DistillSummary:
        return run(tmp_path, teacher, stages=[KL_ONLY], data=f"datasets:{data}::{split}", tokens=20 * TOKENS)

    summary = learn("train")
    assert summary.kept == "trained" and summary.held_out_tokens == TOKENS
    assert 0 < summary.after.kl_nats < summary.before.kl_nats
    assert not (tmp_path / "out" / "logits").exists()
    with pytest.raises(ConfigError, match="has only 10 tokens"):
        learn("test")


def test_draws_from_the_command_line_teach_a_student_of_the_users_own(
    tmp_path: Path, called: Callable[..., Any]
) -> None:
    teacher = tiny_checkpoint(tmp_path, "mixtral", name="teacher")
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS * 12))
    student = dense_student(tmp_path / "student", tiny_tokenizer())
    sizes = ["--tokens", 800, "--sequence-length", 32, "--data", tmp_path / "text.txt"]
    code, _, err = called("logits", "capture", teacher, "--out", tmp_path / "draws", "--rs", 50, *sizes)
    assert code == 0, err
    stage = {"stage_name": "all", "steps": 6, "learning_rate": 0.01, "losses": {"kl": 1.0}, "alpha": 1.0}
    wishes = [f"distill.data={tmp_path / 'draws'}", f"distill.stages={json.dumps([stage])}", "distill.batch_rows=2"]
    command = ["distill", teacher, "--student", student, "--out", tmp_path / "out"]
    code, out, err = called(*command, *(part for wish in wishes for part in ("--set", wish)))
    assert code == 0 and "trained; held-out KL fell" in out, err
    code, _, err = called(*command, *(part for wish in [*wishes, "distill.temperature=2"] for part in ("--set", wish)))
    assert code == 2 and "set distill.temperature=1" in err
