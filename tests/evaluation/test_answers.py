"""Answers: never generated twice, kept through kills, and a row that breaks is its own affair."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_edge.contracts.errors import ConfigError
from moe_edge.evaluation import answers
from moe_edge.evaluation.answers import AnsweringModel, Journal, Protocol, answer_all
from moe_edge.metrics.text_answers import Answer, Status
from moe_edge.runtimes.base import ClosingRuntime, Prompt
from moe_edge.runtimes.sampling import GREEDY, Sampling
from moe_edge.texts.instruction_rows import read_instruction_sets


def test_the_defaults_are_minillms_contract() -> None:
    protocol = Protocol()
    assert protocol.facts().model_dump() == {
        "runs": ["10", "20", "30", "40", "50"],
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_prompt_tokens": 256,
        "max_new_tokens": 256,
        "is_minillm_contract": True,
    }
    assert list(Protocol(GREEDY).runs) == ["greedy"] and not Protocol(GREEDY).facts().is_minillm_contract


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
    monkeypatch.setattr(answers, "open_codec", lambda kind, path, runtime: Bytes())
    return Echo()


PLAIN = Protocol(Sampling(), (10, 20), prompt_tokens=40, max_new_tokens=8)


def answer(
    tmp_path: Path, echo: Echo, prompts: list[str], protocol: Protocol = PLAIN, digest: str = "a"
) -> dict[Any, Answer | None]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": one, "output": "x"}) + "\n" for one in prompts))
    rows = read_instruction_sets([path])[0].rows
    journal = Journal(tmp_path / "answers.jsonl", digest, protocol)
    answer_all(rows, AnsweringModel(tmp_path, "echo", digest, 1, echo), protocol, journal, batch_size=2)
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
        Status.OK,
        Status.EXCEPTION,
        Status.EXCEPTION,
        Status.DECODE_ERROR,
        Status.OK,
    ]
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


@pytest.mark.parametrize("values", [{"seeds": ()}, {"seeds": (1, 1)}, {"prompt_tokens": 0}, {"max_new_tokens": 0}])
def test_impossible_protocols(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Protocol(**values)
