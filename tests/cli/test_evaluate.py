"""`moe-edge evaluate`: the untrained student and what a user can get wrong."""

import json
import sys
from pathlib import Path

import pytest

from tests.evaluation.small_set import silent_student, write_set


def test_the_command_on_the_untrained_student(tmp_path: Path, called, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    student, data = silent_student(tmp_path), write_set(tmp_path)
    code, out, err = called("evaluate", student, "--data", data, "--seeds", "10,20", "--max-new-tokens", 6, "--json")
    assert code == 10, err
    result = json.loads(out)
    assert result["schema"] == "moe-edge/evaluate@1"
    assert result["sets"]["tiny set/test"]["metrics"]["rouge_l"]["value"] == 0
    assert "Traceback" not in err and "share of empty answers is 1" in err
    assert json.loads((tmp_path / "runs" / "untrained-evaluate" / "evaluate.json").read_text()) == result
    options = ("--greedy", "--max-empty-rate", 1, "--limit", 2, "--out", "o")
    code, out, _ = called("evaluate", student, "--data", data, *options)
    assert code == 0 and "| tiny set/test | 2 |" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none.gguf", "--data", "DATA"], 2, "no such artifact"),
        (["DATA", "--data", "DATA"], 4, "not a model"),
        (["DATA", "--data", "none.jsonl"], 2, "no such instruction set"),
        (["DATA", "--data", "DATA,DATA"], 2, "twice"),
        (["DATA", "--data", "DATA", "--seeds", "ten"], 2, "not numbers"),
        (["DATA", "--data", "DATA", "--max-new-tokens", "0"], 2, "Invalid value"),
        (["DATA", "--data", "DATA", "--max-truncated-rate", "2"], 2, "Invalid value"),
    ],
)
def test_usage_errors(tmp_path: Path, called, arguments: list[str], code: int, words: str) -> None:
    data = str(write_set(tmp_path))
    given = [one.replace("DATA", data) for one in arguments]
    status, out, err = called("evaluate", *given, "--out", tmp_path / "o")
    assert status == code and words in err and out == ""


def test_a_wrong_path_is_said_before_the_runtimes_are_imported(tmp_path: Path, called, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "moe_edge.evaluation.answers", None)  # importing it would fail
    status, _, err = called("evaluate", tmp_path / "none.gguf", "--data", write_set(tmp_path))
    assert status == 2 and "no such artifact" in err
