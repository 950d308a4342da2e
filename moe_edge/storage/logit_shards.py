"""A logit cache of any size: a folder of shards that are written whole, by any number of processes, in any order.

    DIR/capture.json          the pins: everything that the content depends on; written first
    DIR/rows.safetensors      the token rows, in order
    DIR/shard-00017.h5        rows 17 n .. 17 n + n - 1, one file of storage/logit_file.py
    DIR/manifest.json         the pins again and the SHA-256 of every file; written last

A shard is written beside its name and renamed, so that it is either whole or absent: a killed capture goes on with the
shards that are missing. Pins that differ are refused with their names, both when a capture goes on and when a cache is
opened. Reading opens shards when their rows are asked for, and checks a shard's hash the first time.

Shape suffixes: N rows, S tokens of a row.
"""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.manifest import MANIFEST_NAME, Manifest, canonical_sha256, content_digest, read_manifest
from moe_edge.storage.files import Closing, read_json, sha256_file, write_json_atomic, write_text_atomic
from moe_edge.storage.folders import hash_folder
from moe_edge.storage.logit_codec import TeacherRow
from moe_edge.storage.logit_file import (
    OTHER_TEACHER,
    Codec,
    LogitCache,
    absent_row,
    codec_of,
    refuse_difference,
    write_rows,
)
from moe_edge.storage.rows import TokenRows, row_key
from moe_edge.storage.sampled_codec import SampledRow

SHARDS_SCHEMA = "moe-edge/logit-shards@1"
CAPTURE, ROWS = "capture.json", "rows.safetensors"
OPEN_SHARDS = 64  # file handles of one reader
OTHER_FOLDER = "choose another --out, or delete the folder"

Pins = Mapping[str, Any]  # plain data; `shard_rows` is how many rows a shard has


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:05d}.h5"


def shard_count(pins: Pins, rows: int) -> int:
    """How many shards so many rows make."""
    return int(-(-rows // pins["shard_rows"]))


def shard_span(pins: Pins, number: int, rows: int) -> range:
    """The rows of a shard."""
    first = number * pins["shard_rows"]
    return range(first, min(first + pins["shard_rows"], rows))


def begin_capture(folder: Path, pins: Pins, rows: TokenRows) -> list[int]:
    """Make the folder ready for the shards, or take up an earlier run's; returns the numbers that are missing.

    Raises:
        InputRejected: the folder holds another capture; every pin that differs is named.
    """
    if (folder / CAPTURE).is_file():
        refuse_difference("the folder holds another capture", folder, read_json(folder / CAPTURE), pins, OTHER_FOLDER)
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise InputRejected("the folder is not empty", where=str(folder), next_command=OTHER_FOLDER)
    else:
        write_json_atomic(folder / CAPTURE, dict(pins))
    if not (folder / ROWS).is_file() or TokenRows.load(folder / ROWS).digest != rows.digest:
        rows.save(folder / ROWS)
    for left in folder.glob("*.h5.*.tmp"):
        left.unlink()
    ids_NS = rows.ids_NS
    return [number for number in range(shard_count(pins, len(ids_NS))) if not _is_whole(folder, pins, number, ids_NS)]


def _is_whole(folder: Path, pins: Pins, number: int, ids_NS: np.ndarray) -> bool:
    """Does the shard exist, and is it of this capture? A damaged one counts as missing."""
    path = folder / shard_name(number)
    if not path.is_file():
        return False
    try:
        with LogitCache(path, shard_identity(pins, number)) as shard:
            return shard.keys == [row_key(ids_NS[row]) for row in shard_span(pins, number, len(ids_NS))]
    except InputRejected:
        return False


def shard_identity(pins: Pins, number: int) -> dict[str, str]:
    """What a shard's file says about itself."""
    return {"capture": canonical_sha256(dict(pins)), "shard": str(number)}


def write_shard(
    folder: Path, pins: Pins, number: int, codec: Codec, ids_NS: Sequence[ArrayLike], records: Sequence[bytes]
) -> None:
    """Write one shard beside its name, wait until it is on the disk, and rename it.

    Args:
        ids_NS, records: the shard's rows and their records, in order.
    """
    path = folder / shard_name(number)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    entries = ((row_key(ids_S), record) for ids_S, record in zip(ids_NS, records, strict=True))
    write_rows(beside, codec, shard_identity(pins, number), entries, len(records))
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)


def finish_capture(folder: Path, pins: Pins, summary: Mapping[str, Any]) -> Manifest:
    """Hash every file and write the manifest; all shards must be there."""
    files = hash_folder(folder)
    inputs = {name: value for name, value in pins.items() if name in ("teacher", "tokenizer", "chat_template", "rows")}
    manifest = Manifest(
        stage="logits",
        key=canonical_sha256(dict(pins)),
        digest=content_digest(files),
        inputs=inputs,
        config=dict(pins),
        files=files,
        summary=dict(summary),
    )
    write_text_atomic(folder / MANIFEST_NAME, manifest.to_json())
    return manifest


class ShardedLogits(Closing):
    """A finished folder, opened for reading; a context manager. Rows are found by their tokens.

    Args:
        expected: pins that must match, for example {"teacher": digest}.

    Raises:
        InputRejected: unfinished, damaged, or pins that differ from `expected` (named, with both values).
    """

    def __init__(self, folder: Path, expected: Mapping[str, Any] | None = None) -> None:
        manifest = read_manifest(folder)
        if manifest is None or manifest.config.get("schema") != SHARDS_SCHEMA:
            why = "there is no manifest of a finished capture"
            command = "run the same 'moe-edge logits capture' again: it goes on with the missing shards"
            raise InputRejected("not a logit cache", where=str(folder), why=why, next_command=command)
        self.path, self.pins, self._files = folder, manifest.config, manifest.files
        refuse_difference(
            OTHER_TEACHER, folder, self.pins, expected or {}, "moe-edge logits capture TEACHER --out OTHER"
        )
        self.rows = TokenRows.load(folder / ROWS)
        refuse_difference(OTHER_TEACHER, folder, {"rows": self.rows.digest}, {"rows": self.pins["rows"]}, OTHER_FOLDER)
        self._index = {row_key(ids_S): index for index, ids_S in enumerate(self.rows.ids_NS)}
        self._open: OrderedDict[int, LogitCache] = OrderedDict()
        self._checked: set[int] = set()
        self.codec = codec_of(self._shard(0).codec.layout())

    @property
    def temperatures(self) -> tuple[float, ...]:
        return self.codec.temperatures

    def __len__(self) -> int:
        return len(self.rows.ids_NS)

    def __contains__(self, ids_S: ArrayLike) -> bool:
        return row_key(ids_S) in self._index

    def row(self, ids_S: ArrayLike) -> TeacherRow | SampledRow:
        """What the teacher said on this row.

        Raises:
            InputRejected: these tokens are not in the cache, or their shard is damaged.
        """
        index = self._index.get(key := row_key(ids_S))
        if index is None:
            raise absent_row(self.path, len(self), key)
        return self._shard(index // self.pins["shard_rows"]).row(ids_S)

    def _shard(self, number: int) -> LogitCache:
        """An open shard; the one unused for longest is closed when there are too many."""
        if number not in self._open:
            self._check(number)
            self._open[number] = LogitCache(self.path / shard_name(number), shard_identity(self.pins, number))
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]

    def _check(self, number: int) -> None:
        name = shard_name(number)
        entry, path = self._files.get(name), self.path / name
        if number in self._checked:
            return
        if entry is None or not path.is_file() or sha256_file(path) != entry.sha256:
            why = "it is missing" if not path.is_file() else "its SHA-256 is not the manifest's"
            raise InputRejected(
                "a shard of the logit cache is damaged",
                where=str(path),
                why=why,
                next_command="delete it and the manifest, and run the same 'moe-edge logits capture' again",
            )
        self._checked.add(number)

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()
