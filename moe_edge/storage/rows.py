"""rows.safetensors: the token rows that a stage ran on, kept so that later stages read exactly the same tokens.

Rows are packed to full length (no padding).

Shape suffixes: N rows, S tokens of a row.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from moe_edge.contracts.errors import InputRejected
from moe_edge.storage.tensor_dict import load_tensors, save_tensors

ROWS_SCHEMA = "moe-edge/rows@1"


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
