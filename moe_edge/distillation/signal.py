"""What the teacher says about a row of tokens, whatever it comes from; losses never ask which.

Today the only source is the logit cache that the profile stage wrote: the teacher need not be in memory, and the
cached row is found by its tokens, so that no other text's targets can slip in.

Shape suffixes: S tokens of a row, K kept ids.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_edge.formulas.divergence import temperature_index
from moe_edge.storage.logits import LogitCache


@dataclass(frozen=True)
class TeacherSignal:
    """The teacher's top-k and its exact tail at one temperature."""

    indices_SK: Tensor  # int64
    logprobs_SK: Tensor  # float32 nats, at T = 1
    tail_logmass_S: Tensor  # float32 nats, at the temperature that was asked for

    def __getitem__(self, span: slice) -> "TeacherSignal":
        return TeacherSignal(self.indices_SK[span], self.logprobs_SK[span], self.tail_logmass_S[span])

    @staticmethod
    def joined(signals: list["TeacherSignal"]) -> "TeacherSignal":
        """The signals of several rows, one after the other."""
        columns = ("indices_SK", "logprobs_SK", "tail_logmass_S")
        return TeacherSignal(*(torch.cat([getattr(signal, name) for signal in signals]) for name in columns))


class SignalSource(Protocol):
    """Anything that can say what the teacher thinks of a row."""

    def signal(self, ids_S: Tensor, temperature: float) -> TeacherSignal: ...


class CachedSignal:
    """The teacher's signal from the logit cache.

    Args:
        path: the HDF5 file.
        expected: identity entries that must match, for example the teacher's digest.

    Raises:
        InputRejected: no cache, or another teacher's.
    """

    def __init__(self, path: Path, expected: dict[str, Any]) -> None:
        self._cache = LogitCache(path, expected)

    @property
    def temperatures(self) -> tuple[float, ...]:
        return self._cache.temperatures

    @property
    def k(self) -> int:
        return self._cache.codec.k

    @property
    def vocab(self) -> int:
        return self._cache.codec.vocab

    def signal(self, ids_S: Tensor, temperature: float) -> TeacherSignal:
        """The signal of one row on the device of its ids.

        Raises:
            ConfigError: no exact tail mass is stored for this temperature.
            InputRejected: the row is not in the cache.
        """
        column = temperature_index(temperature, self._cache.temperatures)
        row = self._cache.row(ids_S.cpu().numpy())
        arrays = (row.indices_SK, row.logprobs_SK, row.tail_logmass_SH[:, column].copy())
        return TeacherSignal(*(torch.from_numpy(array).to(ids_S.device) for array in arrays))

    def close(self) -> None:
        self._cache.close()
