"""`moe-edge evaluate`: the untrained student from a fresh process, and what a user can get wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.small_set import silent_student, write_set


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "moe_edge", "evaluate", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "COLUMNS": "200"}
    return subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment)


def test_the_command_on_the_untrained_student(tmp_path: Path) -> None:
    student, data = silent_student(tmp_path), write_set(tmp_path)
    done = command(student, "--data", data, "--seeds", "10,20", "--max-new-tokens", 6, "--json", cwd=tmp_path)
    assert done.returncode == 10, done.stderr
    result = json.loads(done.stdout)
    assert result["schema"] == "moe-edge/evaluate@1"
    assert result["sets"]["tiny set/test"]["metrics"]["rouge_l"]["value"] == 0
    assert "Traceback" not in done.stderr and "share of empty answers is 1" in done.stderr
    assert json.loads((tmp_path / "runs" / "untrained-evaluate" / "evaluate.json").read_text()) == result
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
def test_usage_errors(tmp_path: Path, called, arguments: list[str], code: int, words: str) -> None:
    data = str(write_set(tmp_path))
    given = [one.replace("DATA", data) for one in arguments]
    status, out, err = called("evaluate", *given, "--out", tmp_path / "o")
    assert status == code and words in err and out == ""
