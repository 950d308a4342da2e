"""Calibration text: recipes and their errors, rendering, deterministic packing, and the held-out guard."""

import json
from pathlib import Path

import numpy as np
import pytest

from moe_edge.contracts.data import data_root
from moe_edge.contracts.errors import ConfigError, EnvironmentProblem, InputRejected
from moe_edge.storage.rows import TokenRows
from moe_edge.texts.documents import Document, read_documents, render
from moe_edge.texts.recipes import load_recipe
from moe_edge.texts.rows import calibration_rows, heldout_rows
from tests.tiny import tiny_tokenizer

CHAT = {"instruction": "Name a colour.", "input": "", "output": "Blue."}


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _rows(recipe: str | Path, tokens: int = 2048, seed: int = 0, length: int = 64) -> TokenRows:
    return calibration_rows(load_recipe(str(recipe)), tiny_tokenizer(), tokens, length, seed)


def test_the_default_recipe_gives_full_rows_by_seed() -> None:
    first, again, other = _rows("default"), _rows("default"), _rows("default", seed=1)
    assert first.ids_NS.shape == (32, 64) and first.ids_NS.dtype == np.int32
    assert first.digest == again.digest != other.digest
    assert not first.short
    assert len(set(first.row_digests())) == 32


def test_the_shipped_data_is_large_credited_and_held_out() -> None:
    loaded = load_recipe("default")
    sample, text, heldout = (path.read_bytes() for path in loaded.files())
    assert len(sample) + len(text) >= 1_600_000 and len(heldout) >= 120_000
    assert all(source.licence == "CC-BY-SA-3.0" for source in loaded.recipe.sources)
    assert not set(sample.splitlines()) & set(heldout.splitlines())
    readme = (loaded.folder / "README.md").read_text(encoding="utf-8")
    assert all(path.name in readme for path in loaded.files()) and "CC BY-SA 3.0" in readme


def test_the_heldout_split_does_not_meet_the_calibration_rows() -> None:
    held = heldout_rows("default", tiny_tokenizer(), 4096, 64, _rows("default", tokens=16384))
    assert held.ids_NS.shape == (64, 64)


def test_heldout_text_that_was_calibrated_on_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(
        "\n\n".join(f"Chapter {n}. " + f"The rain fell on page {n}. " * 60 for n in range(9)), encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="held-out text is part"):
        heldout_rows(str(path), tiny_tokenizer(), 512, 64, _rows(path, tokens=100_000))


def test_shares_are_kept_while_there_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(["aaaa " * 500] * 40), encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n\n".join(["zzzz " * 500] * 40), encoding="utf-8")
    credit = "source: s\n    licence: x"
    (tmp_path / "mix.yaml").write_text(
        f"sources:\n  - path: a.txt\n    share: 3\n    {credit}\n  - path: b.txt\n    share: 1\n    {credit}\n",
        encoding="utf-8",
    )
    rows = _rows(tmp_path / "mix.yaml", tokens=40_000)
    text = tiny_tokenizer().decode(rows.ids_NS.flatten())
    assert 2 < text.count("a") / text.count("z") < 4
    everything = _rows(tmp_path / "mix.yaml", tokens=10**6)
    assert everything.short and everything.n_tokens > 40_000


def test_too_little_text_gives_fewer_rows_or_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _write(tmp_path / "few.jsonl", [CHAT] * 5)
    rows = _rows(path, tokens=10_000, length=16)
    assert rows.short and 0 < rows.n_tokens < 1000
    assert "were asked for" in caplog.text
    with pytest.raises(ConfigError, match="less than one row of 4096"):
        _rows(path, tokens=10_000, length=4096)


def test_rows_of_every_shape_are_rendered(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    documents = read_documents(_write(tmp_path / "a.jsonl", [CHAT | {"input": "Warm."}, chat, {"text": "plain"}]))
    tokenizer = tiny_tokenizer()
    texts = [render(document, tokenizer) for document in documents]
    assert "Name a colour.\n\nWarm." in texts[0] and "<|im_start|>assistant\nBlue." in texts[0]
    assert "Hi" in texts[1] and texts[2] == "plain"
    tokenizer.chat_template = None
    alpaca = render(documents[0], tokenizer)
    assert "### Instruction:\nName a colour.\n\n### Input:\nWarm.\n\n### Response:\nBlue." in alpaca
    assert "paired" not in render(documents[1], tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ undefined_thing.field }}",
        "{{ raise_exception('no system role') }}",
        "{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{% if %}",
    ],
)
def test_a_failing_or_hostile_template_is_refused(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputRejected, match="chat template"):
        render(Document([{"role": "user", "content": "x"}]), tokenizer)


@pytest.mark.parametrize(
    "line",
    [
        '{"instruction": "no output"}',
        "not json",
        '{"text": 3}',
        "[1]",
        '{"messages": [{"role": "user"}]}',
        '"text"',
        "3",
        '{"messages": ["hi"]}',
        '{"conversations": {"from": "human"}}',
        '{"prompt": "a"}',
        '{"text": null}',
        '{"messages": [], "tools": "{"}',
        "[" * 100_000,
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(CHAT) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(InputRejected, match="line 2"):
        read_documents(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_json_array_holds_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text(json.dumps([CHAT, {"text": "plain"}], indent=1))
    first, second = read_documents(path)
    assert first.content == [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]
    assert second.content == "plain" and second.where.endswith("row 2")
    path.write_text(json.dumps([CHAT, {"other": 1}]))
    with pytest.raises(InputRejected, match="(?s)row 2.*columns other"):
        read_documents(path)


def test_odd_but_valid_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "odd.NDJSON"
    lines = [
        '\ufeff{"text": "a\u2028b", "n": NaN}',
        "",
        '\ufeff {"text": "half \\ud800"} ',
        '{"text": ""}',
        '{"messages": []}',
    ]
    path.write_bytes("\r\n".join([*lines, '{"messages": null, "text": "end"}']).encode())
    assert [render(one, tiny_tokenizer()) for one in read_documents(path)] == ["a\u2028b", "half ?", "end"]


def test_known_forms_of_chats_become_the_same_messages(tmp_path: Path) -> None:
    asked, told = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    rows: list[dict[str, object]] = [
        {"conversations": sharegpt},
        {"messages": sharegpt},
        {"conversations": [asked, told]},
        {"prompt": [asked], "completion": [told]},
        {"prompt": "Hi", "completion": [told]},
        {"instruction": "Hi", "context": "", "response": "Ho"},
    ]
    documents = read_documents(_write(tmp_path / "rows.jsonl", [*rows, {"prompt": "Once", "completion": " upon"}]))
    assert [one.content for one in documents] == [[asked, told]] * len(rows) + ["Once upon"]
    (system,) = read_documents(_write(tmp_path / "system.jsonl", [{"system": "Be brief.", "conversations": sharegpt}]))
    assert system.content == [{"role": "system", "content": "Be brief."}, asked, told]


@pytest.mark.parametrize("as_text", [False, True])
def test_whole_messages_and_tools_reach_the_template(tmp_path: Path, as_text: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for t in tools %}T:{{ t.function.name }} {% endfor %}{% for m in messages %}{{ m.role + ':' + m.content }}"
        "{{ m.reasoning_content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %};{% endfor %}"
    )
    tools = [{"type": "function", "function": {"name": "clock"}}]
    call = {"role": "assistant", "reasoning_content": "think", "tool_calls": tools}
    row = {"messages": [{"role": "user", "content": "time?"}, call], "tools": json.dumps(tools) if as_text else tools}
    (document,) = read_documents(_write(tmp_path / "tools.jsonl", [row]))
    assert render(document, tokenizer) == "T:clock user:time?;assistant:thinkclock;"


def test_rows_that_the_template_refuses_are_left_out_while_they_are_few(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    refused = {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}
    path = _write(tmp_path / "rows.jsonl", [CHAT, refused, *[CHAT] * 98])
    calibration_rows(load_recipe(str(path)), tokenizer, 10_000, 16, 0)
    assert "1 of 100 rows are left out" in caplog.text and f"{path}, line 2" in caplog.text
    path = _write(path, [CHAT, refused, *[CHAT] * 97])
    with pytest.raises(InputRejected, match=r"(?s)line 2.*no system.*1 of 99 rows"):
        calibration_rows(load_recipe(str(path)), tokenizer, 10_000, 16, 0)


def test_no_more_of_a_long_text_is_tokenized_than_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer needs a hundred times the memory of its text."""
    tokenizer, given = tiny_tokenizer(), []
    real = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, text, **rest: given.append(text) or real(self, text, **rest)
    )
    path = tmp_path / "one line.txt"
    path.write_text("the quick fox " * 500_000)
    rows = calibration_rows(load_recipe(str(path)), tokenizer, 2048, 64, 0)
    assert rows.ids_NS.shape == (32, 64) and len(given) == 1 and len(given[0]) <= 1 << 16
    path.write_text("x" * 100_000 + " the end")
    given.clear()
    everything = calibration_rows(load_recipe(str(path)), tokenizer, 10**6, 8, 0)
    assert "".join(given) == path.read_text() and tokenizer.decode(everything.ids_NS.flatten()).startswith("x" * 50)
    assert (everything.ids_NS == tokenizer.eos_token_id).sum() <= 1


def test_unreadable_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(InputRejected, match="UTF-8"):
        read_documents(tmp_path / "latin.txt")
    with pytest.raises(InputRejected, match="no text"):
        read_documents(tmp_path / "empty.txt")
    with pytest.raises(ConfigError, match="no such text file"):
        heldout_rows(str(tmp_path / "absent.txt"), tiny_tokenizer(), 64, 16)


def test_a_wrong_recipe_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shipped recipes: default"):
        load_recipe("defualt")
    path = tmp_path / "r.yaml"
    path.write_text("sources:\n  - path: a\n    source: s\n    licence: l\n    shaer: 2\n")
    with pytest.raises(ConfigError, match="did you mean 'share'.*line 5"):
        load_recipe(str(path))


def test_data_root_finds_what_is_shipped() -> None:
    assert (data_root("calibration") / "default.yaml").is_file()
    with pytest.raises(EnvironmentProblem, match="nothing"):
        data_root("nothing")


@pytest.mark.parametrize("content", [None, ["Blue.", "Red."], [{"type": "text", "text": "Blue."}]])
def test_an_answer_that_is_no_text_is_refused_where_there_is_no_template(tmp_path: Path, content: object) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    path = _write(tmp_path / "rows.jsonl", [CHAT | {"output": content}])
    with pytest.raises(InputRejected, match="not text"):
        calibration_rows(load_recipe(str(path)), tokenizer, 64, 8, 0)
