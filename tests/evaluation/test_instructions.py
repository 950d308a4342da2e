"""evaluate: the untrained student of the first seed end to end, answers that are never generated twice, rows that break."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_edge.contracts.errors import ConfigError, EnvironmentProblem, InputRejected
from moe_edge.evaluation import answers as evaluate_answers
from moe_edge.evaluation import instructions as evaluate
from moe_edge.evaluation.answers import Journal, Model, Protocol, answer_all
from moe_edge.evaluation.instructions import Settings, run
from moe_edge.export.gguf import write_gguf
from moe_edge.export.onnx import export_onnx
from moe_edge.metrics import text
from moe_edge.metrics.text_answers import Answer, Status
from moe_edge.models.loading import load_model
from moe_edge.reporting.evaluation_text import evaluation_text
from moe_edge.runtimes.base import ClosingRuntime, Prompt
from moe_edge.runtimes.sampling import GREEDY, Sampling
from moe_edge.texts.instruction_rows import read_instruction_sets
from tests.tiny import tiny_checkpoint

EOS = 2
ROWS = [
    {"category": "facts", "instruction": "Name the capital of France.", "input": "", "output": "Paris"},
    {"category": "facts", "instruction": "How many legs has a spider?", "output": ["eight", "8 legs"]},
    {"category": "style", "instruction": "Shorten.", "input": "It is raining cats and dogs.", "output": "It pours."},
    {"category": "style", "instruction": "Say something.", "output": ""},
]
SHORT = Protocol(Sampling(), (10, 20), prompt_tokens=48, max_new_tokens=6)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "tiny set" / "test.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BOOTSTRAP_SAMPLES", 50)


def silent_student(folder: Path) -> Path:
    """A random student whose first token is always the end: a large constant in every embedding points the head at it."""
    checkpoint = tiny_checkpoint(folder, "qwen3_moe", name="untrained")
    model = load_model(checkpoint)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 50.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[EOS, 0] = 50.0
    model.save_pretrained(checkpoint)
    return checkpoint


@pytest.mark.parametrize("kind", ["hf", "gguf", "onnx"])
def test_an_untrained_student_that_says_nothing(tmp_path: Path, data: Path, kind: str) -> None:
    """Zeros instead of a division by zero, every row counted, and the gate says why it failed."""
    artifact = student = silent_student(tmp_path)
    if kind == "gguf":
        artifact = tmp_path / "untrained.gguf"
        write_gguf(student, artifact, name="untrained")
    if kind == "onnx":
        artifact = tmp_path / "onnx"
        export_onnx(student, artifact, precision="fp32")
    result = run(artifact, read_instruction_sets([data]), Settings(SHORT), tmp_path / "out")
    assert result == json.loads((tmp_path / "out" / "evaluate.json").read_text())
    part = result["sets"]["tiny set/test"]
    assert part["counts"]["n"] == 3 and part["counts"]["n_answers"] == part["counts"]["n_empty"] == 6
    assert part["counts"]["statuses"]["empty"] == 6 and part["counts"]["n_truncated"] == 0
    assert part["counts"]["excluded_rows"] == ["tiny set/test:4"]
    for metric in part["metrics"].values():
        assert metric["value"] == 0 and metric["ci95"] == [0, 0] and metric["mean_nonempty"] is None
    assert set(part["categories"]) == {"facts", "style"} and part["categories"]["style"]["counts"]["n"] == 1
    assert result["verdict"] == "fail" and "empty answers is 1" in result["reasons"][0]
    shown = evaluation_text(result)
    assert "| tiny set/test | 3 | 0.00 [0.00, 0.00] |" in shown and "| 100.0 % |" in shown
    assert "1 rows have no reference" in shown


def test_a_talking_student_passes_and_differs_by_seed(tmp_path: Path, data: Path) -> None:
    checkpoint, out = tiny_checkpoint(tmp_path, "qwen3_moe"), tmp_path / "out"
    result = run(checkpoint, read_instruction_sets([data]), Settings(SHORT, batch_size=2), out)
    assert result["verdict"] == "pass" and result["artifact"]["format"] == "hf"
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and {line["run"] for line in lines} == {"10", "20"}
    assert len({line["answer"]["text"] for line in lines}) > 3
    assert result["protocol"]["runs"] == ["10", "20"] and not result["protocol"]["is_minillm_contract"]
    again = run(checkpoint, read_instruction_sets([data]), Settings(SHORT, batch_size=3), tmp_path / "again")
    assert again["sets"]["tiny set/test"]["metrics"] == result["sets"]["tiny set/test"]["metrics"]


def test_the_defaults_are_minillms_contract() -> None:
    protocol = Protocol()
    assert protocol.to_dict() == {
        "runs": ["10", "20", "30", "40", "50"], "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_prompt_tokens": 256,
        "max_new_tokens": 256, "is_minillm_contract": True,
    }  # fmt: skip
    assert list(Protocol(GREEDY).runs) == ["greedy"] and not Protocol(GREEDY).to_dict()["is_minillm_contract"]


class Echo(ClosingRuntime):
    """Answers with its prompt's last tokens; counts what it is asked; breaks where it is told to."""

    name, vocab = "echo", 256

    def __init__(self, room: int = 10**6, broken: str = "") -> None:
        self.asked: list[str] = []
        self.context_length, self.broken, self.opened = room, broken, 0

    def __call__(self, kind: str, path: Path, threads: int, context_length: int) -> "Echo":
        self.opened += 1
        return self

    def generate_batch(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop_ids: Collection[int], sampling: Sampling
    ) -> list[list[int]]:
        for prompt in prompts:
            if self.broken and self.broken in bytes(prompt.ids).decode():
                raise RuntimeError(f"cannot answer {self.broken}")
        self.asked += [f"{prompt.seed} {bytes(prompt.ids).decode()}" for prompt in prompts]
        return [list(prompt.ids)[-4:] for prompt in prompts]


class Bytes:
    """One token per byte; a text with "unspeakable" in it cannot be encoded, an answer "nope" not decoded."""

    stop_ids = frozenset({0})

    def encode(self, text: str) -> list[int]:
        if "unspeakable" in text:
            raise ValueError("no tokens for this")
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        if bytes(ids) == b"nope":
            raise KeyError("no text for this")
        return bytes(ids).decode()


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Echo:
    monkeypatch.setattr(evaluate_answers, "open_codec", lambda kind, path, runtime: Bytes())
    return Echo()


PLAIN = Protocol(Sampling(), (10, 20), prompt_tokens=40, max_new_tokens=8)


def answer(
    tmp_path: Path, echo: Echo, prompts: list[str], protocol: Protocol = PLAIN, digest: str = "a"
) -> dict[Any, Answer | None]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": one, "output": "x"}) + "\n" for one in prompts))
    rows = read_instruction_sets([path])[0].rows
    journal = Journal(tmp_path / "answers.jsonl", digest, protocol)
    answer_all(rows, Model(tmp_path, "echo", digest, 1, echo), protocol, journal, batch_size=2)
    return {(row.prompt, run): journal.find(row, run) for row in rows for run in protocol.runs}


def test_nothing_is_answered_twice(tmp_path: Path, echo: Echo) -> None:
    first = answer(tmp_path, echo, ["one", "two", "one"])
    assert sorted(echo.asked) == ["10 one", "10 two", "20 one", "20 two"] and echo.opened == 1
    assert answer(tmp_path, echo, ["one", "two"]) == first and echo.opened == 1
    answer(tmp_path, echo, ["one", "three"])
    assert sorted(echo.asked[4:]) == ["10 three", "20 three"]
    wider = Protocol(Sampling(), (10, 20, 30), 40, 8)
    answer(tmp_path, echo, ["one"], wider)
    assert echo.asked[6:] == ["30 one"]


@pytest.mark.parametrize("other", [{"digest": "b"}, {"protocol": Protocol(Sampling(0.5), (10, 20), 40, 8)}])
def test_another_model_or_protocol_answers_anew(tmp_path: Path, echo: Echo, other: dict[str, Any]) -> None:
    answer(tmp_path, echo, ["one"])
    answer(tmp_path, echo, ["one"], **other)
    assert len(echo.asked) == 4


def test_a_torn_last_line_is_dropped_and_answered_again(tmp_path: Path, echo: Echo) -> None:
    expected = answer(tmp_path, echo, ["one", "two"])
    path = tmp_path / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert answer(tmp_path, echo, ["one", "two"]) == expected and len(echo.asked) == 5
    assert path.read_bytes() == whole
    path.write_bytes(b'[1]\nnonsense\n{"row": "x"}\n' + whole.replace(b'"text": "one"', b'"text_": "one"'))
    assert answer(tmp_path, echo, ["one", "two"]) == expected and len(echo.asked) == 7


def test_a_row_that_breaks_is_its_own_affair(tmp_path: Path, echo: Echo) -> None:
    echo.broken = "bad"
    prompts = ["good", "bad", "unspeakable", "nope", "fine"]
    found = answer(tmp_path, echo, prompts, Protocol(GREEDY, (1,), 40, 8))
    by_prompt = {prompt: one for (prompt, _), one in found.items() if one}
    assert [by_prompt[prompt].status for prompt in prompts] == [
        Status.OK, Status.EXCEPTION, Status.EXCEPTION, Status.DECODE_ERROR, Status.OK,
    ]  # fmt: skip
    assert by_prompt["good"].text == "good" and by_prompt["bad"].text == by_prompt["nope"].text == ""
    assert "cannot answer bad" in str(by_prompt["bad"].error) and "no text" in str(by_prompt["nope"].error)
    echo.broken, echo.asked = "", []
    found = answer(tmp_path, echo, prompts, Protocol(GREEDY, (1,), 40, 8))
    assert echo.asked == ["0 bad"]  # failures are tried again, and nothing else
    assert found["bad", "greedy"] is not None and found["bad", "greedy"].status is Status.OK


def test_a_long_prompt_keeps_its_beginning(tmp_path: Path, echo: Echo) -> None:
    answer(tmp_path, echo, ["0123456789" * 5], Protocol(GREEDY, (1,), 40, 8))
    assert echo.asked == ["0 " + "0123456789" * 4]


def test_a_short_context_is_refused_with_a_way_out(tmp_path: Path, echo: Echo) -> None:
    echo.context_length = 44
    with pytest.raises(ConfigError, match="--max-new-tokens 4") as caught:
        answer(tmp_path, echo, ["one"])
    assert "it holds 44" in str(caught.value) and not echo.asked


@pytest.mark.parametrize(
    "values", [{"seeds": ()}, {"seeds": (1, 1)}, {"prompt_tokens": 0}, {"max_new_tokens": 0}]
)  # fmt: skip
def test_impossible_protocols(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Protocol(**values)


@pytest.mark.parametrize("values", [{"batch_size": 0}, {"max_empty_rate": 1.5}])
def test_impossible_settings(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Settings(**values)


def test_a_folder_without_tokenizer_is_rejected(tmp_path: Path, data: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen3_moe", with_tokenizer=False)
    with pytest.raises(InputRejected, match="tokenizer"):
        run(checkpoint, read_instruction_sets([data]), Settings(SHORT), tmp_path / "out")


def test_an_encoder_that_is_not_there_is_a_usage_error(tmp_path: Path, data: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen3_moe")
    with pytest.raises(ConfigError, match="no such BERTScore encoder"):
        run(checkpoint, read_instruction_sets([data]), Settings(SHORT, bertscore=tmp_path / "none"), tmp_path / "out")


@pytest.mark.skipif(importlib.util.find_spec("bert_score") is None, reason="the extra 'bertscore' is not installed")
def test_a_broken_encoder_is_rejected_before_the_first_answer(tmp_path: Path, data: Path) -> None:
    checkpoint, encoder = tiny_checkpoint(tmp_path, "qwen3_moe"), tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text('{"model_type": "bert"}')
    (encoder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(InputRejected, match="encoder cannot be used"):
        run(checkpoint, read_instruction_sets([data]), Settings(SHORT, bertscore=encoder), tmp_path / "out")
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_a_missing_metric_library_is_found_before_the_first_answer(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, *_: Any) -> None:
        raise EnvironmentProblem(f"{name} is missing")

    monkeypatch.setattr(evaluate, "compute", missing)
    with pytest.raises(EnvironmentProblem):
        run(tiny_checkpoint(tmp_path, "qwen3_moe"), read_instruction_sets([data]), Settings(SHORT), tmp_path / "out")
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_an_empty_set_fails_with_a_reason_and_leaves_null(tmp_path: Path, data: Path) -> None:
    data.write_text(json.dumps(ROWS[3]) + "\n")
    result = run(
        tiny_checkpoint(tmp_path, "qwen3_moe"), read_instruction_sets([data]), Settings(SHORT), tmp_path / "out"
    )
    assert result["verdict"] == "fail" and "not measured (no row with a reference)" in result["reasons"][0]
    assert result["average"]["rouge_l"] == {"value": None, "reason": "no value for tiny set/test"}
    assert "n/a (no row with a reference)" in evaluation_text(result)


def test_the_average_is_over_sets(tmp_path: Path, data: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "hello", "output": "你好"}) + "\n")
    result = run(
        silent_student(tmp_path),
        read_instruction_sets([data, other]),
        Settings(SHORT, max_empty_rate=1),
        tmp_path / "o",
    )
    assert len(result["sets"]) == 2 and result["average"]["chrf"] == {"value": 0, "reason": None}
    assert result["verdict"] == "pass" and any("read chrF" in note for note in result["notes"])
    assert "| average |" in evaluation_text(result)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first = tiny_checkpoint(tmp_path, "qwen3_moe", name="a")
    second = tiny_checkpoint(tmp_path, "qwen3_moe", name="b")
    assert evaluate.artifact_digest(first) == evaluate.artifact_digest(second)
    (second / "generation_config.json").write_text("{}")
    assert evaluate.artifact_digest(first) != evaluate.artifact_digest(second)
    np.testing.assert_equal(len(evaluate.artifact_digest(first / "config.json")), len("sha256:") + 64)


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe_edge", "evaluate", *map(str, arguments)], capture_output=True, text=True, timeout=120,
        cwd=cwd, env=os.environ | {"PYTHONPATH": os.getcwd(), "COLUMNS": "200"},
    )  # fmt: skip


def test_the_command_on_the_untrained_student(tmp_path: Path, data: Path) -> None:
    student = silent_student(tmp_path)
    done = command(student, "--data", data, "--seeds", "10,20", "--max-new-tokens", 6, "--json", cwd=tmp_path)
    assert done.returncode == 10, done.stderr
    result = json.loads(done.stdout)
    assert result["sets"]["tiny set/test"]["metrics"]["rouge_l"]["value"] == 0
    assert "Traceback" not in done.stderr and "share of empty answers is 1" in done.stderr
    assert (tmp_path / "runs" / "untrained-evaluate" / "evaluate.json").is_file()
    done = command(student, "--data", data, "--greedy", "--max-empty-rate", 1, "--limit", 2, "--out", "o", cwd=tmp_path)
    assert done.returncode == 0 and "| tiny set/test | 2 |" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none.gguf", "--data", "DATA"], 2, "no such artifact"),
        (["DATA", "--data", "DATA"], 4, "not a model"),
        (["DATA", "--data", "none.jsonl"], 2, "no such instruction set"),
        (["DATA", "--data", "DATA,DATA"], 2, "twice"),
        (["DATA", "--data", "DATA", "--seeds", "ten"], 2, "not numbers"),
        (["DATA", "--data", "DATA", "--max-new-tokens", "0"], 2, "at least one token"),
    ],
)
def test_usage_errors(
    data: Path, tmp_path: Path, arguments: list[str], code: int, words: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from moe_edge.cli.main import main as cli

    monkeypatch.setattr(cli, "handle_interrupts", lambda: None)
    given = [one.replace("DATA", str(data)) for one in arguments]
    monkeypatch.setattr(sys, "argv", ["moe-edge", "evaluate", *given, "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr()
    assert stop.value.code == code and words in shown.err and shown.out == ""
