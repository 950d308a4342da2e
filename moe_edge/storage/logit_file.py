"""One HDF5 file of the logit cache: how it is laid out, written and read; one chunk per row, keyed by the row's tokens.

Format (moe-edge/logits@1), a plain HDF5 file:

- attribute `schema` = "moe-edge/logits@1"; `layout`: JSON that names the codec of the rows, with `sequence_length` S and
  `vocab` V; `identity`: JSON of strings (teacher digest, tokenizer, calibration...), compared when the file is opened;
- dataset `keys` [N, 32] uint8: SHA-256 of each row's token ids as little-endian int32;
- dataset `rows` [N, R] uint8, one uncompressed chunk per row: the record of storage/logit_codec.py (top-k and tails) or
  storage/sampled_codec.py (random draws).

A row belongs to exactly one token sequence: it is found by content, never by position, so that another seed or
another text can not silently yield another row's targets. Reading a row is one read and a table look-up.

Shape suffixes: N rows, S tokens of a row, R bytes of a record.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import ArrayLike

from moe_edge.contracts.errors import InputRejected
from moe_edge.storage.files import Closing
from moe_edge.storage.logit_codec import Bytes, RowCodec, TeacherRow
from moe_edge.storage.rows import row_key
from moe_edge.storage.sampled_codec import SampledCodec, SampledRow

LOGITS_SCHEMA = "moe-edge/logits@1"
KEY_BYTES = 32
OTHER_TEACHER = "the logit cache belongs to another teacher or calibration"
PROFILE_AGAIN = "run the profile stage again: moe-edge profile --fresh"
Codec = RowCodec | SampledCodec


def codec_of(layout: Mapping[str, Any]) -> Codec:
    """The codec that a layout names. Raises KeyError, TypeError or ValueError when it names none."""
    return SampledCodec.of_layout(layout) if "draws" in layout else RowCodec.of_layout(layout)


class LogitCache(Closing):
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
            refuse_difference(
                OTHER_TEACHER, path, found, {name: str(value) for name, value in (expected or {}).items()}
            )
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        try:
            layout = json.loads(self._file.attrs["layout"])
            identity = json.loads(self._file.attrs["identity"])
            schema, rows = self._file.attrs["schema"], self._file["rows"]
            keys = self._file["keys"][...]
            codec, shape, chunks = codec_of(layout), rows.shape, rows.chunks
        except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise InputRejected("not a logit cache", where=str(self.path), why=str(error)) from error
        if schema != LOGITS_SCHEMA or shape != (len(keys), codec.row_bytes) or chunks != (1, codec.row_bytes):
            why = f"schema {schema}, rows {shape} in chunks {chunks}, expected rows of {codec.row_bytes} bytes"
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
        index = self._index.get(key := row_key(ids_S))
        if index is None:
            raise absent_row(self.path, len(self), key)
        return index

    def record(self, index: int) -> Bytes:
        """The raw bytes of the row at `index`."""
        _, raw = self._rows.id.read_direct_chunk((index, 0))
        return np.frombuffer(raw, dtype=np.uint8)

    def row(self, ids_S: ArrayLike) -> TeacherRow | SampledRow:
        """What the teacher said on this row.

        Raises:
            InputRejected: these tokens are not in the cache, or the file is damaged.
        """
        index = self.index(ids_S)
        try:
            return self.codec.row(self.record(index))
        except (OSError, RuntimeError, ValueError) as error:
            raise InputRejected("the logit cache is damaged", where=str(self.path), why=str(error)) from error

    def close(self) -> None:
        self._file.close()


def absent_row(path: Path, rows: int, key: bytes) -> InputRejected:
    """The error for a row that a cache of so many rows does not hold."""
    return InputRejected(
        "the logit cache does not hold this row",
        where=str(path),
        why=f"none of its {rows} rows has the digest {key.hex()[:16]}...",
        next_command="capture this text, or train on the rows of the cache",
    )


def refuse_difference(
    what: str, path: Path, found: Mapping[str, Any], expected: Mapping[str, Any], next_command: str = PROFILE_AGAIN
) -> None:
    """Raises InputRejected, saying `what`, that names every expected entry that differs, with both values."""
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        texts = [f"{name}: found {found.get(name, 'absent')}, expected {expected[name]}" for name in differing]
        raise InputRejected(what, where=str(path), why="; ".join(texts), next_command=next_command)


def write_rows(
    path: Path, codec: Codec, identity: Mapping[str, str], records: Iterable[tuple[bytes, bytes]], count: int
) -> None:
    """One HDF5 file without timestamps, in place: the same rows give the same bytes.

    Args:
        records: (key, record) of every row; a record shorter than the codec's rows is filled up with zeros.
        count: how many rows there are.
    """
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.attrs["schema"] = LOGITS_SCHEMA
        file.attrs["layout"] = json.dumps(codec.layout(), sort_keys=True)
        file.attrs["identity"] = json.dumps(dict(identity), sort_keys=True)
        rows = file.create_dataset(
            "rows", (count, codec.row_bytes), "u1", chunks=(1, codec.row_bytes), track_times=False
        )
        keys = np.zeros((count, KEY_BYTES), dtype=np.uint8)
        for index, (key, record) in enumerate(records):
            rows.id.write_direct_chunk((index, 0), record.ljust(codec.row_bytes, b"\0"))
            keys[index] = np.frombuffer(key, dtype=np.uint8)
        file.create_dataset("keys", data=keys, track_times=False)
