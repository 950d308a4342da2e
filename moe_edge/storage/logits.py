"""The logit cache: the teacher's top-k of every token in one HDF5 file, one chunk per row, keyed by the row's tokens.

Format (moe-edge/logits@1), a plain HDF5 file:

- attribute `schema` = "moe-edge/logits@1"; `layout`: JSON with `sequence_length` S, `k`, `vocab` V, `temperatures`;
  `identity`: JSON of strings (teacher digest, tokenizer, calibration...), compared when the cache is opened;
- dataset `keys` [N, 32] uint8: SHA-256 of each row's token ids as little-endian int32;
- dataset `rows` [N, S B] uint8, one uncompressed chunk per row: the record that storage/logit_codec.py specifies.

A row belongs to exactly one token sequence: it is found by content, never by position, so that another seed or
another text can not silently yield another row's targets. Reading a row is one read and a table look-up.

Writing is resumable and the file's bytes depend on its content alone: rows go to an append-only journal beside it
(`NAME.journal`: a JSON line, then key and record of every row), a half-written last row is cut off on resume, and
`close` turns the journal into the HDF5 file under a temporary name that is then renamed. An HDF5 file that is being
written when its process is killed cannot be relied on; the journal can.

Shape suffixes: N rows, S tokens of a row, K kept ids, H temperatures.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import h5py
import numpy as np
from numpy.typing import ArrayLike

from moe_edge.contracts.errors import InputRejected
from moe_edge.storage.logit_codec import Floats, Ints, RowCodec

LOGITS_SCHEMA = "moe-edge/logits@1"
KEY_BYTES = 32


@dataclass(frozen=True)
class TeacherRow:
    """The teacher's distribution over one row; nats."""

    indices_SK: Ints
    logprobs_SK: Floats  # at T = 1, descending
    tail_logmass_SH: Floats  # log of the mass outside K at each of the cache's temperatures


def row_key(ids_S: ArrayLike) -> bytes:
    """SHA-256 of the token ids as little-endian int32, 32 bytes."""
    return hashlib.sha256(np.ascontiguousarray(ids_S, dtype="<i4").tobytes()).digest()


class LogitCacheWriter:
    """Appends rows; a context manager that finishes the file when its block ends without an exception.

    Rows that an interrupted run has already written are in it from the start; appending them again does nothing.

    Args:
        path: the HDF5 file to be.
        vocab: true vocabulary V of the teacher.
        k: kept ids per token, capped at the vocabulary.
        temperatures: those whose tail mass `append` gets, in this order; must contain 1.
        identity: what pins the cache: digests and names, as strings.

    Raises:
        InputRejected: `path` or its journal holds a cache with another identity or layout.
    """

    def __init__(
        self, path: Path, vocab: int, k: int, temperatures: Sequence[float], identity: Mapping[str, Any]
    ) -> None:
        self.path, self.vocab, self.k = path, vocab, min(k, vocab)
        self.temperatures = tuple(float(t) for t in temperatures)
        if 1.0 not in self.temperatures:
            raise ValueError("the tail mass at temperature 1 must be among those stored")
        self.identity = {name: str(value) for name, value in identity.items()}
        self.journal_path = path.with_name(path.name + ".journal")
        self._keys: set[bytes] = set()
        self._journal: BinaryIO | None = None
        self._codec: RowCodec | None = None
        if self.journal_path.exists():
            self._resume()
        elif path.exists():
            self._reopen()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, ids_S: ArrayLike) -> bool:
        return row_key(ids_S) in self._keys

    def append(
        self, ids_S: ArrayLike, logprobs_SK: ArrayLike, indices_SK: ArrayLike, tail_logmass_SH: ArrayLike
    ) -> None:
        """Add one row; a row with the same tokens is already there and is not written again.

        Args:
            ids_S: the row's token ids.
            logprobs_SK, indices_SK, tail_logmass_SH: `formulas.divergence.teacher_topk` of its logits.

        Raises:
            ValueError: shapes do not fit, or the row has another length than the first one.
        """
        key, tokens = row_key(ids_S), len(np.asarray(ids_S))
        if self._codec is None:
            self._start(tokens)
        assert self._codec is not None and self._journal is not None
        if tokens != self._codec.sequence_length:
            raise ValueError(f"every row has {self._codec.sequence_length} tokens, this one has {tokens}")
        if key in self._keys:
            return
        arrays = (np.asarray(logprobs_SK, np.float32), np.asarray(indices_SK, np.int64))
        self._write(key, self._codec.encode(*arrays, np.asarray(tail_logmass_SH, np.float32)))

    def take(self, ids_S: ArrayLike, cache: "LogitCache") -> None:
        """Add a row of another cache as it lies there, unless it is here already.

        Raises:
            InputRejected: the caches differ in layout, or that one does not hold the row.
        """
        key = row_key(ids_S)
        if self._codec is None:
            self._start(cache.codec.sequence_length)
        assert self._codec is not None
        _same("logit cache", cache.path, _layout(cache.codec), _layout(self._codec))
        if key not in self._keys:
            self._write(key, cache.record(cache.index(ids_S)).tobytes())

    def _write(self, key: bytes, record: bytes) -> None:
        assert self._journal is not None
        self._journal.write(key + record)
        self._journal.flush()
        self._keys.add(key)

    def close(self) -> None:
        """Write the HDF5 file and drop the journal.

        Raises:
            ValueError: there is not a single row.
        """
        if self._journal is None or self._codec is None:
            raise ValueError("a logit cache needs at least one row")
        self._journal.close()
        temporary = self.path.with_name(self.path.name + ".tmp")
        with self.journal_path.open("rb") as journal:
            _write_hdf5(temporary, self._codec, self.identity, _records(journal, self._codec), len(self))
        os.replace(temporary, self.path)
        self.journal_path.unlink()
        self._journal = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._journal is not None:
            self._journal.close()

    def _header(self, codec: RowCodec) -> bytes:
        head = {"schema": LOGITS_SCHEMA, "identity": self.identity, "layout": _layout(codec)}
        return json.dumps(head, sort_keys=True).encode() + b"\n"

    def _start(self, tokens: int) -> None:
        self._codec = RowCodec(tokens, self.k, self.vocab, self.temperatures)
        self._journal = self.journal_path.open("wb")
        self._journal.write(self._header(self._codec))

    def _resume(self) -> None:
        """Take over the whole rows of a journal; one without a whole first line is begun anew."""
        with self.journal_path.open("rb") as journal:
            head = journal.readline()
            if not head.endswith(b"\n"):
                return
            tokens = json.loads(head)["layout"]["sequence_length"]
            codec = RowCodec(tokens, self.k, self.vocab, self.temperatures)
            _same("journal of a logit cache", self.journal_path, json.loads(head), json.loads(self._header(codec)))
            self._keys = {key for key, _ in _records(journal, codec, head_read=True)}
        whole = len(head) + len(self._keys) * (KEY_BYTES + codec.row_bytes)
        self._codec, self._journal = codec, self.journal_path.open("r+b")
        self._journal.truncate(whole)
        self._journal.seek(whole)

    def _reopen(self) -> None:
        """Put the rows of a finished cache back into a journal, so that more can follow."""
        with LogitCache(self.path, self.identity) as cache:
            self._start(cache.codec.sequence_length)
            assert self._codec is not None and self._journal is not None
            _same("logit cache", self.path, _layout(cache.codec), _layout(self._codec))
            for index, key in enumerate(cache.keys):
                self._journal.write(key + cache.record(index).tobytes())
            self._journal.flush()
            self._keys = set(cache.keys)


class LogitCache:
    """A finished cache, opened for reading; a context manager.

    Args:
        expected: identity entries that must match; None: take what is there.

    Raises:
        InputRejected: no logit cache, damaged, or its identity differs from `expected` (both are named).
    """

    def __init__(self, path: Path, expected: Mapping[str, Any] | None = None) -> None:
        self.path = path
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise InputRejected("the logit cache cannot be read", where=str(path), why=str(error)) from error
        try:
            self._read_header()
            found = {name: self.identity.get(name, "absent") for name in expected or {}}
            _same("logit cache", path, found, {name: str(value) for name, value in (expected or {}).items()})
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        try:
            layout = json.loads(self._file.attrs["layout"])
            identity = json.loads(self._file.attrs["identity"])
            schema, rows = self._file.attrs["schema"], self._file["rows"]
            keys = self._file["keys"][...]
            codec = RowCodec(layout["sequence_length"], layout["k"], layout["vocab"], tuple(layout["temperatures"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputRejected("not a logit cache", where=str(self.path), why=str(error)) from error
        if schema != LOGITS_SCHEMA or rows.shape != (len(keys), codec.row_bytes) or rows.chunks != (1, codec.row_bytes):
            why = (
                f"schema {schema}, rows {rows.shape} in chunks {rows.chunks}, expected rows of {codec.row_bytes} bytes"
            )
            raise InputRejected("not a logit cache of this version", where=str(self.path), why=why)
        self.codec, self.identity, self._rows = codec, identity, rows
        self.keys = [key.tobytes() for key in keys]
        self._index = {key: index for index, key in enumerate(self.keys)}

    @property
    def temperatures(self) -> tuple[float, ...]:
        return self.codec.temperatures

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, ids_S: ArrayLike) -> bool:
        return row_key(ids_S) in self._index

    def index(self, ids_S: ArrayLike) -> int:
        """Where the row of these tokens lies. Raises InputRejected when it is not here."""
        key = row_key(ids_S)
        if key not in self._index:
            why = f"none of its {len(self)} rows has the digest {key.hex()[:16]}..."
            raise InputRejected("the logit cache does not hold this row", where=str(self.path), why=why)
        return self._index[key]

    def record(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The raw bytes of the row at `index`."""
        _, raw = self._rows.id.read_direct_chunk((index, 0))
        return np.frombuffer(raw, dtype=np.uint8)

    def row(self, ids_S: ArrayLike) -> TeacherRow:
        """What the teacher said on this row.

        Raises:
            InputRejected: these tokens are not in the cache, or the file is damaged.
        """
        index = self.index(ids_S)
        try:
            logprobs_SK, indices_SK, tail_SH = self.codec.decode(self.record(index))
        except (OSError, ValueError) as error:
            raise InputRejected("the logit cache is damaged", where=str(self.path), why=str(error)) from error
        return TeacherRow(indices_SK, logprobs_SK, tail_SH)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _layout(codec: RowCodec) -> dict[str, Any]:
    return {
        "k": codec.k,
        "sequence_length": codec.sequence_length,
        "temperatures": list(codec.temperatures),
        "vocab": codec.vocab,
    }


def _same(what: str, path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises InputRejected naming every entry that differs, with both values."""
    differing = [f"{name}: found {found.get(name)}, expected {expected[name]}" for name in expected]
    differing = [text for name, text in zip(expected, differing, strict=True) if found.get(name) != expected[name]]
    if differing:
        raise InputRejected(
            f"the {what} belongs to another teacher or calibration", where=str(path), why="; ".join(differing),
            next_command="run the profile stage again: moe-edge profile --fresh",
        )  # fmt: skip


def _records(journal: BinaryIO, codec: RowCodec, head_read: bool = False) -> Iterator[tuple[bytes, bytes]]:
    """(key, record) of every whole row of a journal."""
    if not head_read:
        journal.readline()
    while len(entry := journal.read(KEY_BYTES + codec.row_bytes)) == KEY_BYTES + codec.row_bytes:
        yield entry[:KEY_BYTES], entry[KEY_BYTES:]


def _write_hdf5(
    path: Path, codec: RowCodec, identity: Mapping[str, str], records: Iterator[tuple[bytes, bytes]], count: int
) -> None:
    """One HDF5 file without timestamps: the same rows give the same bytes."""
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.attrs["schema"] = LOGITS_SCHEMA
        file.attrs["layout"] = json.dumps(_layout(codec), sort_keys=True)
        file.attrs["identity"] = json.dumps(dict(identity), sort_keys=True)
        rows = file.create_dataset(
            "rows", (count, codec.row_bytes), "u1", chunks=(1, codec.row_bytes), track_times=False
        )
        keys = np.zeros((count, KEY_BYTES), dtype=np.uint8)
        for index, (key, record) in enumerate(records):
            rows.id.write_direct_chunk((index, 0), record)
            keys[index] = np.frombuffer(key, dtype=np.uint8)
        file.create_dataset("keys", data=keys, track_times=False)
