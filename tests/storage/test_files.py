"""Atomic writing: the same data are the same bytes, and a failed write leaves the old file alone."""

import hashlib
import json
from pathlib import Path

import pytest

from moe_edge.contracts.errors import InputRejected
from moe_edge.storage.files import CHUNK_BYTES, model_name, read_json, sha256_file, write_json_atomic, write_text_atomic


def test_text_replaces_the_old_file_and_makes_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_text_atomic(path, "old\n")
    write_text_atomic(path, "Größe 3 €\n")
    assert path.read_bytes() == "Größe 3 €\n".encode()
    assert [file.name for file in path.parent.iterdir()] == ["b.txt"]


def test_json_is_the_same_bytes_for_the_same_data(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "one", {"b": 1, "a": [1.5, None, "ü"]})
    write_json_atomic(tmp_path / "two", {"a": [1.5, None, "ü"], "b": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one").read_text(encoding="utf-8").endswith('"b": 1\n}\n')
    assert read_json(tmp_path / "one") == {"b": 1, "a": [1.5, None, "ü"]}


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json_atomic(path, {"kept": True})
    with pytest.raises(ValueError):
        write_json_atomic(path, {"bad": float("nan")})
    assert json.loads(path.read_text()) == {"kept": True}


def test_read_json_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match="missing"):
        read_json(tmp_path / "nothing.json")


def test_sha256_over_several_chunks(tmp_path: Path) -> None:
    content = b"ab" * (CHUNK_BYTES // 2 + 7)
    (tmp_path / "f").write_bytes(content)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(content).hexdigest()


HUB = "models--Owner--Some-Model-30B/snapshots"


@pytest.mark.parametrize(
    ("folder", "source", "config", "name"),
    [
        ("Model-7B", "{}", {}, "Model-7B"),
        ("Model-7B", "{}/", {}, "Model-7B"),
        ("Model-7B", ".", {}, "Model-7B"),
        ("Model-7B/inner", "..", {}, "Model-7B"),
        ("Model-7B/inner", "../../Model-7B/inner/./", {}, "inner"),
        (f"{HUB}/{'0a' * 20}", "{}", {}, "Some-Model-30B"),
        (f"{HUB}/{'0a' * 20}", ".", {}, "Some-Model-30B"),
        (f"{HUB}/{'0a' * 20}/onnx", "{}", {}, "onnx"),
        ("0a" * 20, "{}", {"_name_or_path": "Owner/Origin-1B", "model_type": "olmoe"}, "Origin-1B"),
        ("0a" * 20, "{}", {"_name_or_path": "x/" + "0b" * 20, "model_type": "olmoe"}, "olmoe"),
        ("模型", "{}", {"_name_or_path": ".", "model_type": "olmoe"}, "olmoe"),
        ("模型", "{}", None, "model"),
        ("a\x1b[31m b", "{}", {}, "a-31m-b"),
        ("x" * 200, "{}", {}, "x" * 100),
    ],
)
def test_a_model_is_called_as_its_folder_is_or_its_place_in_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, source: str, config: object, name: str
) -> None:
    place = tmp_path / folder
    place.mkdir(parents=True)
    (place / "config.json").write_text("damaged" if config is None else json.dumps(config))
    monkeypatch.chdir(place)
    assert model_name(source.format(place)) == name


@pytest.mark.parametrize(
    ("source", "name"),
    [(None, "demo-teacher"), ("Owner/Name-1.5B", "Name-1.5B"), ("~nobody-at-all/Name", "Name"), ("/", "model")],
)
def test_a_model_that_is_no_folder_here_is_called_as_it_is_asked_for(source: str | None, name: str) -> None:
    assert model_name(source) == name
