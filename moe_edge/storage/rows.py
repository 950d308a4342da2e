"""Rows that a stage keeps on disk: the token rows that it ran on, and float32 rows of what does not fit into memory.

`TokenRows` (rows.safetensors) are packed to full length, without padding, and kept so that later stages read exactly the same
tokens.

`Spill` is written in order and read back by number. The file is plain little-endian float32 without a header and lives
only inside an unfinished stage folder; whoever resumes checks with `is_complete` that it was written to its end. Rows are read
and written plainly, not mapped, because mapped pages count as memory of the process.

Shape suffixes: N rows, S tokens of a row, X any further axes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from moe_edge.contracts.errors import InputRejected
from moe_edge.storage.files import Closing
from moe_edge.storage.tensor_files import load_tensors, save_tensors

ROWS_SCHEMA = "moe-edge/rows@1"
SPILL_ITEM_BYTES = 4


@dataclass(frozen=True)
class TokenRows:
    """Packed token rows of one text source."""

    ids_NS: np.ndarray  # int32
    asked_tokens: int  # what the configuration asked for; there may be less text

    @property
    def n_tokens(self) -> int:
        return int(self.ids_NS.size)

    @property
    def short(self) -> bool:
        """True when the text had fewer tokens than asked for, beyond the rest that fills no row."""
        return bool(len(self.ids_NS) < self.asked_tokens // self.ids_NS.shape[1])

    @property
    def digest(self) -> str:
        """SHA-256 over shape and ids: the identity of the whole set."""
        shape = np.asarray(self.ids_NS.shape, dtype="<i8").tobytes()
        return hashlib.sha256(shape + _bytes(self.ids_NS)).hexdigest()

    def row_digests(self) -> list[str]:
        return [row_digest(ids_S) for ids_S in self.ids_NS]

    def save(self, path: Path) -> None:
        header = {"schema": ROWS_SCHEMA, "asked_tokens": self.asked_tokens, "digest": self.digest}
        save_tensors(path, {"ids_NS": torch.from_numpy(self.ids_NS)}, header)

    @classmethod
    def load(cls, path: Path) -> "TokenRows":
        """Read and verify a rows file.

        Raises:
            InputRejected: unreadable, foreign, or changed since it was written.
        """
        tensors, header = load_tensors(path)
        if header.get("schema") != ROWS_SCHEMA or "ids_NS" not in tensors:
            raise InputRejected("not a file of token rows", where=str(path), why=f"schema {header.get('schema')}")
        rows = cls(tensors["ids_NS"].numpy(), header["asked_tokens"])
        if rows.digest != header["digest"]:
            raise InputRejected("token rows were changed after they were written", where=str(path))
        return rows


def row_key(ids_S: ArrayLike) -> bytes:
    """SHA-256 of the token ids as little-endian int32, 32 bytes: under it the logit cache stores the row."""
    return hashlib.sha256(_bytes(ids_S)).digest()


def row_digest(ids_S: ArrayLike) -> str:
    """`row_key` in hexadecimal."""
    return row_key(ids_S).hex()


def _bytes(ids: ArrayLike) -> bytes:
    return np.ascontiguousarray(ids, dtype="<i4").tobytes()


class Spill(Closing):
    """Float32 rows of one shape in a file; a context manager.

    Args:
        path: the file.
        shape: of one row.
        write: begin the file anew, instead of reading what is there.
    """

    def __init__(self, path: Path, shape: Sequence[int], *, write: bool = False) -> None:
        self.shape = tuple(shape)
        self._file = path.open("wb" if write else "rb")

    def append(self, rows_NX: Tensor) -> None:
        """Write rows behind those that are there."""
        if tuple(rows_NX.shape[1:]) != self.shape:
            raise ValueError(f"rows of shape {self.shape} are kept here, not {tuple(rows_NX.shape[1:])}")
        self._file.write(np.ascontiguousarray(rows_NX.float().cpu().numpy(), dtype="<f4").data)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop, float32 in memory of their own. Raises EOFError when the file ends before."""
        size = prod(self.shape)
        self._file.seek(start * size * SPILL_ITEM_BYTES)
        values = np.fromfile(self._file, dtype="<f4", count=(stop - start) * size)
        if values.size != (stop - start) * size:
            raise EOFError(f"{self._file.name} ends before row {stop}")
        return torch.from_numpy(values).view(stop - start, *self.shape)

    def close(self) -> None:
        self._file.close()


def is_complete(path: Path, rows: int, shape: Sequence[int]) -> bool:
    """Is there a file of exactly this many rows?"""
    return path.is_file() and path.stat().st_size == rows * prod(shape) * SPILL_ITEM_BYTES
