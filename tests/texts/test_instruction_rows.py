"""Instruction sets: MiniLLM's template to the letter, hostile lines refused by number, texts made safe for every metric."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.texts.instruction_rows import build_prompt, clean_text, read_instruction_sets


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_the_template_is_minillms() -> None:
    assert build_prompt("Add.", "1, 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    )
    assert build_prompt("Which is a species of fish? Tope or Rope") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhich is a species of fish? Tope or Rope\n\n### Response:\n"
    )
    assert "{input} {x}" in build_prompt("{input} {x}", "{instruction}") and "\n{instruction}\n" in build_prompt(
        "a", "{instruction}"
    )


def test_fields(tmp_path: Path) -> None:
    path = write(
        tmp_path / "dolly" / "test.jsonl",
        {"topic": "qa", "instruction": "A", "input": "", "output": "x"},
        "\n",
        {"category": "math", "topic": "qa", "instruction": "B", "input": None, "output": ["x", "", None, " y\x00 "]},
        {"prompt": "ready made", "output": None},
        '{"instruction": "C", "output": NaN}\n',
        {"instruction": "half a pair \ud800", "output": "z\ud800"},
    )
    (one,) = read_instruction_sets([path])
    assert one.name == "dolly/test" and len(one.sha256) == 64
    assert [row.category for row in one.rows] == ["qa", "math", None, None, None]
    assert [row.references for row in one.rows] == [("x",), ("x", "y"), (), (), ("z?",)]
    assert one.rows[2].prompt == "ready made" and one.rows[4].prompt.encode()
    assert [row.row_id for row in one.rows] == [f"dolly/test:{line}" for line in (1, 3, 4, 5, 6)]
    assert len({row.digest for row in one.rows}) == 5
    assert len(read_instruction_sets([path], limit=2)[0].rows) == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "not JSON"), ("[1]\n", "not a JSON object"), ('{"output": "x"}\n', "neither instruction nor prompt")],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path / "x.jsonl", {"instruction": "A"}, line)
    with pytest.raises(InputRejected, match=words) as caught:
        read_instruction_sets([path])
    assert "line 2" in str(caught.value) and caught.value.exit_code == 4


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such instruction set"):
        read_instruction_sets([tmp_path / "none.jsonl"])
    path = write(tmp_path / "x.jsonl", {"instruction": "A"})
    with pytest.raises(ConfigError, match="twice"):
        read_instruction_sets([path, tmp_path / "." / "x.jsonl"])
    with pytest.raises(ConfigError, match="no instruction set"):
        read_instruction_sets([])
    with pytest.raises(InputRejected, match="no row"):
        read_instruction_sets([write(tmp_path / "empty.jsonl", "\n")])
    pointer = write(tmp_path / "y.jsonl", "version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputRejected, match="LFS|content"):
        read_instruction_sets([pointer])


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    paths = [write(tmp_path / top / "dolly" / "test.jsonl", {"instruction": "A"}) for top in ("a", "b")]
    names = [one.name for one in read_instruction_sets(paths)]
    assert names == [str(path) for path in paths]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (float("nan"), ""), (3, ""), (["x"], ""), (b"x", ""), ("", ""), (" \n\t ", ""), ("\x00\x1b\x7f", ""),
        ("a\x00b", "ab"), (" a\nb\tc ", "a\nb\tc"), ("half\ud83d", "half?"), ("x\ufffd", "x"), ("中文", "中文"),
    ],
)  # fmt: skip
def test_clean_text(value: object, text: str) -> None:
    assert clean_text(value) == text
