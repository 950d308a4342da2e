"""One row of random draws as bytes: for every token the unique ids that were drawn, how often, and the teacher's entropy.

The record of a row of S tokens, N draws each, of a vocabulary V (w = bits of V - 1, b = w // 8, r = w % 8); M is the
number of unique draws of all tokens:

| plane | bytes | content |
|---|---|---|
| unique | S | how many unique ids each token has, 1..N |
| entropy | 2 S | float16, nats, of the teacher's distribution at the temperature of the draws |
| id words | b M | the low 8 b bits of every id, token by token, ascending |
| id bits | ceil(M r / 8) | the top r bits of every id, packed little-endian |
| counts | M | how often each was drawn |

Records differ in length; in a file all are filled up to the longest. At V = 151,936 a unique id costs 3.25 bytes: 50
draws with about 15 unique ids make 52 bytes per token.

Shape suffixes: S tokens of a row, U most unique draws of a token, M unique draws of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import numpy as np

from moe_edge.storage.logit_codec import Bytes, Floats, Ints, id_bits, pack_ids, unpack_ids

MAX_DRAWS = 255


@dataclass(frozen=True)
class SampledRow:
    """Draws from the teacher over one row."""

    indices_SU: Ints  # 0 where the count is 0
    counts_SU: Ints  # each token's sum is the number of draws
    entropy_S: Floats  # nats


@dataclass(frozen=True)
class SampledCodec:
    """Encodes and decodes rows of one cache of draws."""

    sequence_length: int
    draws: int
    vocab: int
    temperature: float
    row_bytes: int  # of the longest record of the file

    def __post_init__(self) -> None:
        if not (1 <= self.draws <= MAX_DRAWS and self.vocab <= 2**23 and self.temperature > 0):
            raise ValueError(f"need 1 <= draws <= {MAX_DRAWS}, vocab <= 2**23 and a temperature, got {self}")

    @classmethod
    def of_layout(cls, layout: Mapping[str, Any]) -> Self:
        """The codec that `layout` describes. Raises KeyError, TypeError or ValueError when it describes none."""
        temperature = float(layout["temperatures"][0])
        return cls(layout["sequence_length"], layout["draws"], layout["vocab"], temperature, layout["row_bytes"])

    def layout(self) -> dict[str, Any]:
        """What a file says about its rows, as plain data."""
        return {
            "draws": self.draws,
            "row_bytes": self.row_bytes,
            "sequence_length": self.sequence_length,
            "temperatures": [self.temperature],
            "vocab": self.vocab,
        }

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The one temperature at which the ids were drawn."""
        return (self.temperature,)

    def encode(self, indices_SU: Ints, counts_SU: Ints, entropy_S: Floats) -> bytes:
        """The record of one row, not filled up.

        Raises:
            ValueError: shapes, ids or counts do not fit this cache.
        """
        tokens = self.sequence_length
        if not (indices_SU.shape == counts_SU.shape and len(indices_SU) == tokens and entropy_S.shape == (tokens,)):
            shapes = (indices_SU.shape, counts_SU.shape, entropy_S.shape)
            raise ValueError(f"expected arrays of {tokens} tokens, got {shapes}")
        if indices_SU.min() < 0 or indices_SU.max() >= self.vocab or (counts_SU.sum(-1) != self.draws).any():
            raise ValueError(f"ids must lie in 0..{self.vocab - 1} and counts sum to {self.draws}")
        drawn_SU = counts_SU > 0
        ids_M = indices_SU[drawn_SU]
        head: bytes = drawn_SU.sum(-1).astype(np.uint8).tobytes() + entropy_S.astype("<f2").tobytes()
        return head + pack_ids(ids_M[None], id_bits(self.vocab)) + counts_SU[drawn_SU].astype(np.uint8).tobytes()

    def row(self, record: Bytes) -> SampledRow:
        """A record as what the teacher said.

        Raises:
            ValueError: it is shorter than it says, or no teacher can have said it.
        """
        tokens, (whole, rest) = self.sequence_length, divmod(id_bits(self.vocab), 8)
        unique_S = record[:tokens].astype(np.int64)
        total = int(unique_S.sum())
        sizes = [2 * tokens, whole * total, (total * rest + 7) // 8, total]
        ends = list(accumulate(sizes, initial=tokens))[1:]
        if ends[-1] > len(record):
            raise ValueError(f"a record of {len(record)} bytes says that it has {ends[-1]}")
        entropy, words, bits, counts = (record[end - size : end] for size, end in zip(sizes, ends, strict=True))
        drawn_SU = np.arange(max(int(unique_S.max()), 1)) < unique_S[:, None]
        indices_SU, counts_SU = (np.zeros(drawn_SU.shape, dtype=np.int64) for _ in range(2))
        indices_SU[drawn_SU] = unpack_ids(words, bits[None], total, id_bits(self.vocab))[0]
        counts_SU[drawn_SU] = counts
        entropy_S = entropy.view("<f2").astype(np.float32)
        if indices_SU.max() >= self.vocab or (counts_SU.sum(-1) != self.draws).any():
            raise ValueError(f"ids must lie in 0..{self.vocab - 1} and the counts of a position sum to {self.draws}")
        if not (np.isfinite(entropy_S) & (entropy_S >= 0)).all():
            raise ValueError("an entropy is negative or not finite")
        return SampledRow(indices_SU, counts_SU, entropy_S)
