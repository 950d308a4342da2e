"""Writing one file of the logit cache row by row, so that a kill costs nothing; the file itself: storage/logit_file.py.

The file's bytes depend on its content alone: rows go to an append-only journal beside it (`NAME.journal`: a JSON line,
then key and record of every row), a half-written last row is cut off on resume, and `close` turns the journal into the
HDF5 file under a temporary name that is then renamed. An HDF5 file that is being written when its process is killed
cannot be relied on; the journal can.

Shape suffixes: S tokens of a row, K kept ids, H temperatures.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike

from moe_edge.storage.logit_codec import RowCodec, TeacherRow
from moe_edge.storage.logit_file import (
    KEY_BYTES,
    LOGITS_SCHEMA,
    OTHER_TEACHER,
    LogitCache,
    refuse_difference,
    write_rows,
)
from moe_edge.storage.rows import row_key

__all__ = ["LogitCache", "LogitCacheWriter", "TeacherRow", "row_key"]


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
        refuse_difference(OTHER_TEACHER, cache.path, cache.codec.layout(), self._codec.layout())
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
            write_rows(temporary, self._codec, self.identity, _records(journal, self._codec), len(self))
        os.replace(temporary, self.path)
        self.journal_path.unlink()
        self._journal = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
        elif self._journal is not None:
            self._journal.close()

    def _header(self, codec: RowCodec) -> bytes:
        head = {"schema": LOGITS_SCHEMA, "identity": self.identity, "layout": codec.layout()}
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
            refuse_difference(
                "the journal of a logit cache belongs to another teacher or calibration",
                self.journal_path,
                json.loads(head),
                json.loads(self._header(codec)),
            )
            self._keys = {key for key, _ in _records(journal, codec, head_read=True)}
        whole = len(head) + len(self._keys) * (KEY_BYTES + codec.row_bytes)
        self._codec, self._journal = codec, self.journal_path.open("r+b")
        self._journal.truncate(whole)
        self._journal.seek(whole)

    def _reopen(self) -> None:
        """Put the rows of a finished cache back into a journal, so that more can follow; a kill leaves the cache."""
        with LogitCache(self.path, self.identity) as cache:
            codec = RowCodec(cache.codec.sequence_length, self.k, self.vocab, self.temperatures)
            refuse_difference(OTHER_TEACHER, self.path, cache.codec.layout(), codec.layout())
            beside = self.journal_path.with_name(self.journal_path.name + ".tmp")
            with beside.open("wb") as journal:
                journal.write(self._header(codec))
                for index, key in enumerate(cache.keys):
                    journal.write(key + cache.record(index).tobytes())
        os.replace(beside, self.journal_path)
        self._resume()


def _records(journal: BinaryIO, codec: RowCodec, head_read: bool = False) -> Iterator[tuple[bytes, bytes]]:
    """(key, record) of every whole row of a journal."""
    if not head_read:
        journal.readline()
    while len(entry := journal.read(KEY_BYTES + codec.row_bytes)) == KEY_BYTES + codec.row_bytes:
        yield entry[:KEY_BYTES], entry[KEY_BYTES:]
