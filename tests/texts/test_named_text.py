"""Text by name: the recipe, a file, a data set of the `datasets` library, and what is said when there is none."""

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_edge.contracts.errors import ConfigError, EnvironmentProblem, InputRejected
from moe_edge.texts.named_text import DatasetName, dataset_name, text_rows
from moe_edge.texts.recipes import data_digests, load_recipe
from moe_edge.texts.rows import calibration_rows
from tests.tiny import TEXTS, tiny_tokenizer


def test_calibration_and_files_are_recipes(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    ours = text_rows("calibration", tokenizer, 640, 64, 3)
    assert np.array_equal(ours.ids_NS, calibration_rows(load_recipe("default"), tokenizer, 640, 64, 3).ids_NS)
    (tmp_path / "some.txt").write_text("\n\n".join(TEXTS * 20))
    rows = text_rows(str(tmp_path / "some.txt"), tokenizer, 256, 64, 0)
    assert rows.ids_NS.shape == (4, 64) and "quick brown" in tokenizer.decode(rows.ids_NS[0])


def test_names_of_data_sets() -> None:
    assert dataset_name("datasets:a/b") == DatasetName("a/b", None, "train")
    assert dataset_name("datasets:a/b:raw") == DatasetName("a/b", "raw", "train")
    assert dataset_name("datasets:a/b:raw:test") == DatasetName("a/b", "raw", "test")
    assert dataset_name("datasets:a/b::test") == DatasetName("a/b", None, "test")
    for text in ("datasets:", "datasets:a:b:c:d"):
        with pytest.raises(ConfigError, match="CONFIG"):
            dataset_name(text)


def folder_of(tmp_path: Path, rows: list[dict[str, Any]], split: str = "train") -> str:
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"datasets:{tmp_path / 'data'}"


def test_a_local_data_set_is_read_and_shuffled(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    texts = [{"text": f"{TEXTS[index % 4]} number {index}"} for index in range(40)]
    name, tokenizer = folder_of(tmp_path, texts), tiny_tokenizer()
    folder_of(tmp_path, [{"text": "held out " * 200}], "test")
    first, second, other = (text_rows(name, tokenizer, 256, 64, seed) for seed in (0, 0, 1))
    assert first.ids_NS.shape == (4, 64)
    assert np.array_equal(first.ids_NS, second.ids_NS) and not np.array_equal(first.ids_NS, other.ids_NS)
    held_out = text_rows(name + "::test", tokenizer, 64, 64, 0)
    assert "held out" in tokenizer.decode(held_out.ids_NS[0])


def test_chats_of_a_data_set_use_the_template(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because " * 30}]
    rows = text_rows(folder_of(tmp_path, [{"messages": chat}] * 3), tiny_tokenizer(), 64, 64, 0)
    assert "<|im_start|>user" in tiny_tokenizer().decode(rows.ids_NS[0])


def test_a_saved_data_set_is_read_by_its_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"conversations": [{"from": "human", "value": "why? " * 40}]}] * 3)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": one}).save_to_disk(str(tmp_path / "splits"))
    tokenizer = tiny_tokenizer()
    for name in (str(tmp_path / "one"), f"datasets:{tmp_path / 'one'}", f"datasets:{tmp_path / 'splits'}::test"):
        assert "<|im_start|>user" in tokenizer.decode(text_rows(name, tokenizer, 64, 64, 0).ids_NS[0])
    with pytest.raises(ConfigError, match="(?s)no split 'train', it has test.*::test"):
        text_rows(str(tmp_path / "splits"), tokenizer, 64, 64, 0)
    assert list(data_digests(str(tmp_path / "splits"))) == ["test/state.json"]
    (tmp_path / "one" / "state.json").write_text("[]")
    with pytest.raises(InputRejected, match="saved data set"):
        text_rows(str(tmp_path / "one"), tokenizer, 64, 64, 0)


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    name = folder_of(tmp_path, [{"other": "x"}])
    with pytest.raises(InputRejected, match="columns other"):
        text_rows(name, tiny_tokenizer(), 64, 64, 0)
    for wrong in (name + "::nope", name + ":nope", "datasets:no-one/nothing"):
        with pytest.raises(ConfigError, match="cannot be loaded"):
            text_rows(wrong, tiny_tokenizer(), 64, 64, 0)


def test_without_the_library_there_is_one_clear_word(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentProblem, match="'datasets' is not installed"):
        text_rows("datasets:a/b", tiny_tokenizer(), 64, 64, 0)
