"""Atomic writing: the same data are the same bytes, and a failed write leaves the old file alone."""

import hashlib
import json
from pathlib import Path

import pytest

from moe_edge.contracts.errors import InputRejected
from moe_edge.storage.files import CHUNK_BYTES, read_json, sha256_file, write_json_atomic, write_text_atomic


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
