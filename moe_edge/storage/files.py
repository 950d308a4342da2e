"""What every room needs of files: atomic text and JSON, JSON reading with clear errors, SHA-256, closing what is open, and what
a model is called in them.

A file that is written beside its final name and then renamed is either whole or absent, whatever kills the process.
"""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from moe_edge.contracts.errors import InputRejected

CHUNK_BYTES = 1 << 22
JSON_LIMIT_BYTES = 64 * 2**20
LFS_MARK = b"version https://git-lfs"
DEMO_NAME = "demo-teacher"
LONGEST_NAME = 100  # characters; formats, bits and parts are added to it, and a disk takes 255 bytes
HUB_CACHE = "models--"  # OWNER--NAME/snapshots/COMMIT
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 `text` with plain newlines; parents are created, an old file is replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write `obj` with sorted keys and two spaces, so that equal data are equal bytes. Raises ValueError on NaN."""
    text = json.dumps(obj, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, text + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may be hostile.

    Raises:
        InputRejected: missing, a Git-LFS pointer, larger than 64 MiB, not UTF-8 JSON, or not an object.
    """
    if not path.is_file():
        raise InputRejected("a file is missing", where=str(path))
    refuse_lfs_pointer(path)
    size = path.stat().st_size
    if size > JSON_LIMIT_BYTES:
        raise InputRejected("a JSON file is too large", where=str(path), why=f"{size} bytes > {JSON_LIMIT_BYTES}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputRejected("a JSON file cannot be parsed", where=str(path), why=str(error)) from error
    if not isinstance(value, dict):
        raise InputRejected("a JSON file does not hold an object", where=str(path), why=type(value).__name__)
    return value


def refuse_lfs_pointer(path: Path) -> None:
    """Raises InputRejected when the file is the text stub that Git-LFS leaves in place of the real one."""
    with path.open("rb") as file:
        if file.read(len(LFS_MARK)) == LFS_MARK:
            why = "it is a Git-LFS pointer, the real file was not downloaded"
            raise InputRejected("a file has no content", where=str(path), why=why, next_command="git lfs pull")


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class Closing(ABC):
    """What holds a file, a model or a process: has a `close`, and calls it where a `with` block ends, whatever happens inside.

    `contextlib.closing` does the same from outside, but every caller would have to remember it.
    """

    @abstractmethod
    def close(self) -> None:
        """Give back what is held; closing twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def model_name(source: str | None) -> str:
    """What a model is called in file names and reports: as its folder or hub id is, in letters that every disk and
    terminal takes; where that says nothing (a commit of the hub's cache, `/`, foreign letters alone), as config.json does.

    Args:
        source: a folder, a file or a hub id; null = the demo teacher.
    """
    if source is None:
        return DEMO_NAME
    safe = (re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") for name in _names(source))
    return next(name for name in safe if name)[:LONGEST_NAME]


def _names(source: str) -> Iterator[str]:
    path = Path(os.path.abspath(os.path.expanduser(source)))
    for folder in (path, path.parent.parent):
        if folder.name.startswith(HUB_CACHE) and (folder == path or path.parent.name == "snapshots"):
            yield folder.name.rpartition("--")[2]
    if not _DIGEST.fullmatch(path.name):
        yield path.name
    try:
        config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    except InputRejected:  # is said where the model is opened
        config = {}
    origin = Path(str(config.get("_name_or_path") or "")).name
    yield from ("" if _DIGEST.fullmatch(origin) else origin, str(config.get("model_type") or ""), "model")
