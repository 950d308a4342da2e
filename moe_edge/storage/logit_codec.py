"""One row of the logit cache as bytes: bit-packed ids, one byte per log-probability, exact tail masses.

The record of a row of S tokens with k kept ids of a vocabulary V (w = bits of V - 1, b = w // 8, r = w % 8),
all planes token-major and without padding:

| plane | bytes per token | content |
|---|---|---|
| id words | b k | the low 8 b bits of every id, an unsigned little-endian integer of b = 0, 1 or 2 bytes |
| id bits | ceil(k r / 8) | the top r bits of every id, least significant first, packed little-endian |
| gaps | k - 1 | one byte c per step down the sorted list: log p falls by 24 (c / 255)^2 nats |
| tails | 2 H | float16, log of the mass outside the k ids at each of H temperatures |

At V = 151,936, k = 32, H = 5: 64 + 8 + 31 + 10 = 113 bytes per token. Gaps are coded against what the decoder
will have reconstructed, so that errors do not add up: each log-probability is off by half a local step, at most
0.01 nat for gaps below 0.3 nat. The level of the list is not stored: it follows from the tail mass, since head
and tail sum to one, and thus the mass outside is exact however coarse the list is.

Shape suffixes: S tokens of a row, K kept ids, H temperatures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

GAP_MAX_NATS = 24.0
_GAPS = (GAP_MAX_NATS * (np.arange(256) / 255.0) ** 2).astype(np.float32)
_EDGES = ((_GAPS[1:] + _GAPS[:-1]) / 2).astype(np.float32)

# _SLICES[r][byte]: the 8 / r numbers of r bits in a byte, the lowest first.
_SLICES = {
    bits: (np.arange(256)[:, None] >> np.arange(0, 8, bits) & (2**bits - 1)).astype(np.int64) for bits in (1, 2, 4)
}

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class TeacherRow:
    """The teacher's distribution over one row; nats."""

    indices_SK: Ints
    logprobs_SK: Floats  # at T = 1, descending; without tail masses: given that the token is one of the k
    tail_logmass_SH: Floats  # log of the mass outside K at each of the cache's temperatures


@dataclass(frozen=True)
class RowCodec:
    """Encodes and decodes rows of one cache."""

    sequence_length: int
    k: int
    vocab: int
    temperatures: tuple[float, ...]  # contains 1.0; empty: a cache from elsewhere, whose tails are unknown

    def __post_init__(self) -> None:
        if not (1 <= self.k <= self.vocab <= 2**23) or (self.temperatures and 1.0 not in self.temperatures):
            raise ValueError(f"need 1 <= k <= vocab <= 2**23 and temperature 1, got {self}")

    @classmethod
    def of_layout(cls, layout: Mapping[str, Any]) -> Self:
        """The codec that `layout` describes. Raises KeyError, TypeError or ValueError when it describes none."""
        return cls(layout["sequence_length"], layout["k"], layout["vocab"], tuple(layout["temperatures"]))

    def layout(self) -> dict[str, Any]:
        """What a file says about its rows, as plain data."""
        return {
            "k": self.k,
            "sequence_length": self.sequence_length,
            "temperatures": list(self.temperatures),
            "vocab": self.vocab,
        }

    @property
    def id_bits(self) -> int:
        return id_bits(self.vocab)

    @property
    def plane_bytes(self) -> tuple[int, int, int, int]:
        """Bytes per token of the four planes."""
        whole, rest = divmod(self.id_bits, 8)
        return self.k * whole, (self.k * rest + 7) // 8, self.k - 1, 2 * len(self.temperatures)

    @cached_property
    def _running_GK(self) -> Floats:
        """Gaps times this are their running sums, with a zero in front: faster than a cumulative sum."""
        return np.triu(np.ones((self.k - 1, self.k), dtype=np.float32), 1)

    @cached_property
    def row_bytes(self) -> int:
        return self.sequence_length * sum(self.plane_bytes)

    def encode(self, logprobs_SK: Floats, indices_SK: Ints, tail_logmass_SH: Floats) -> bytes:
        """The record of one row.

        Raises:
            ValueError: shapes or ids do not fit this cache, or a list is not descending.
        """
        self._check(logprobs_SK, indices_SK, tail_logmass_SH)
        gaps, tails = _gap_codes(logprobs_SK).tobytes(), tail_logmass_SH.astype("<f2").tobytes()
        return pack_ids(indices_SK, self.id_bits) + gaps + tails

    def _check(self, logprobs_SK: Floats, indices_SK: Ints, tail_logmass_SH: Floats) -> None:
        tokens, temperatures = self.sequence_length, len(self.temperatures)
        expected = [(tokens, self.k), (tokens, self.k), (tokens, temperatures)]
        found = [logprobs_SK.shape, indices_SK.shape, tail_logmass_SH.shape]
        if found != expected:
            raise ValueError(f"expected arrays of shapes {expected}, got {found}")
        if indices_SK.min() < 0 or indices_SK.max() >= self.vocab:
            raise ValueError(f"ids must lie in 0..{self.vocab - 1}")
        if not (np.isfinite(logprobs_SK).all() and (np.diff(logprobs_SK, axis=-1) <= 0).all()):
            raise ValueError("log-probabilities must be finite and descending")
        if np.isnan(tail_logmass_SH).any():
            raise ValueError("log tail masses must not be NaN")

    def decode(self, record: Bytes) -> tuple[Floats, Ints, Floats]:
        """(log-probabilities at T = 1 [S, K], ids [S, K], log tail masses [S, H]) of one record."""
        tokens = self.sequence_length
        sizes = [tokens * size for size in self.plane_bytes]
        ends = list(accumulate(sizes))
        id_words, id_bits, gaps, tails = (record[end - size : end] for size, end in zip(sizes, ends, strict=True))
        ids_SK = unpack_ids(id_words, id_bits.reshape(tokens, -1), self.k, self.id_bits)
        tail_SH = tails.view("<f2").reshape(tokens, len(self.temperatures)).astype(np.float32)
        fall_SK = _GAPS.take(gaps.reshape(tokens, self.k - 1)) @ self._running_GK
        head_S = _log_head(tail_SH[:, self.temperatures.index(1.0)]) if self.temperatures else np.float32(0)
        level_S = head_S - np.log(np.exp(-fall_SK) @ np.ones(self.k, dtype=np.float32))
        return np.subtract(level_S[:, None], fall_SK, out=fall_SK), ids_SK, tail_SH

    def row(self, record: Bytes) -> TeacherRow:
        """A record as what the teacher said. Raises ValueError when it has another size, or no teacher can have said it."""
        logprobs_SK, indices_SK, tail_SH = self.decode(record)
        if indices_SK.max() >= self.vocab or (np.diff(np.sort(indices_SK, axis=-1), axis=-1) == 0).any():
            raise ValueError(f"a position names a token twice, or one beyond the vocabulary of {self.vocab}")
        if self.temperatures and not (tail_SH <= 0).all():
            raise ValueError("a tail holds more than all the mass, or NaN")
        if self.temperatures and (tail_SH[:, self.temperatures.index(1.0)] == 0).any():
            raise ValueError("the kept tokens of a position have no mass at all")
        return TeacherRow(indices_SK, logprobs_SK, tail_SH)


def id_bits(vocab: int) -> int:
    """Bits of the largest id."""
    return max(1, (vocab - 1).bit_length())


def pack_ids(indices_SK: Ints, bits: int) -> bytes:
    """The two planes of ids: whole bytes as words, then the other bits packed token by token."""
    whole, rest = divmod(bits, 8)
    ids_SK = indices_SK.astype(np.uint32)
    words = (ids_SK & (256**whole - 1)).astype(f"<u{whole}").tobytes() if whole else b""
    bits_SKr = (ids_SK[..., None] >> np.arange(8 * whole, 8 * whole + rest, dtype=np.uint32)) & 1
    bits_S = bits_SKr.astype(np.uint8).reshape(len(ids_SK), -1)
    return words + (np.packbits(bits_S, axis=-1, bitorder="little").tobytes() if rest else b"")


def unpack_ids(words: Bytes, packed_SB: Bytes, k: int, bits: int) -> Ints:
    """The ids [S, k] of two planes."""
    whole, rest = divmod(bits, 8)
    ids_SK = _unpack_bits(packed_SB, k, rest)
    if whole:
        ids_SK <<= 8 * whole
        ids_SK |= words.view(f"<u{whole}").reshape(ids_SK.shape)
    return ids_SK


def _unpack_bits(packed_SB: Bytes, k: int, bits: int) -> Ints:
    """k numbers of `bits` bits per row, [S, k] int64; by table where they do not straddle bytes."""
    tokens = len(packed_SB)
    if bits == 0:
        return np.zeros((tokens, k), dtype=np.int64)
    if 8 % bits == 0:
        return np.ascontiguousarray(_SLICES[bits].take(packed_SB, axis=0).reshape(tokens, -1)[:, :k])
    bits_SKr = np.unpackbits(packed_SB, axis=-1, count=k * bits, bitorder="little").reshape(tokens, k, bits)
    numbers: Ints = bits_SKr.astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64))
    return numbers


def _gap_codes(logprobs_SK: Floats) -> Bytes:
    """The code of every step down, chosen against the reconstruction so far."""
    tokens, k = logprobs_SK.shape
    codes_SK = np.zeros((tokens, k - 1), dtype=np.uint8)
    target_SK = (logprobs_SK[:, :1] - logprobs_SK).astype(np.float32)
    reached_S = np.zeros(tokens, dtype=np.float32)
    for step in range(1, k):
        codes_S = np.searchsorted(_EDGES, target_SK[:, step] - reached_S)
        codes_SK[:, step - 1] = codes_S
        reached_S += _GAPS[codes_S]
    return codes_SK


def _log_head(tail_logmass_S: Floats) -> Floats:
    """log(1 - tail mass), with the tail kept away from 1 by float32's resolution."""
    head: Floats = np.log1p(-np.minimum(np.exp(tail_logmass_S), np.float32(1 - 1e-6)))
    return head
