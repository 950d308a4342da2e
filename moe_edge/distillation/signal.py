"""What the teacher says about a row of tokens, whatever it comes from; losses never ask which.

Four forms with one interface. `pair` gives log-probabilities of teacher and student over the same outcomes, from which
any divergence can be made; `forward_kl` gives KL(teacher || student). A `TeacherSignal` is the cache's top-k and exact
tail, a `HeadSignal` an imported top-k without tail, a `SampledSignal` a cache of random draws, which knows the forward KL
only and refuses `pair`; a `HiddenSignal` (teacher.py) is the whole distribution of a live teacher.

`ids` says how little of the student's logits is enough. A cached row is found by its tokens, so that no other text's
targets can slip in.

Shape suffixes: S tokens of a row, t tokens of a chunk, K kept ids, U unique draws, V vocabulary, C outcomes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moe_edge.contracts.errors import ConfigError
from moe_edge.formulas.divergence import coarse_pair, forward_kl, head_pair, temperature_index
from moe_edge.formulas.logit_views import LogitView
from moe_edge.formulas.sampling import sampled_kl
from moe_edge.storage.files import Closing
from moe_edge.storage.logit_shards import ShardedLogits
from moe_edge.storage.logits import LogitCache
from moe_edge.storage.sampled_codec import SampledCodec, SampledRow


class Signal(Protocol):
    """The teacher on some tokens of a row, or of several."""

    def __getitem__(self, chosen: slice | Tensor) -> Self:
        """On some of these tokens: a span of them, or a mask."""

    @property
    def ids(self) -> Tensor | None:
        """The ids that it compares one by one, int64 [t, K], -1 = none; None: the whole vocabulary."""

    def pair(self, student: LogitView, temperature: float) -> tuple[Tensor, Tensor]:
        """(teacher, student): log-probabilities at `temperature` over the same C outcomes, [t, C] each.

        Args:
            student: student logits on the same tokens; it knows `ids` at least, all of them where these are None.
            temperature: the one that the signal was asked for.

        Raises:
            ConfigError: this signal does not know the teacher's distribution.
        """

    def forward_kl(self, student: LogitView, temperature: float) -> Tensor:
        """KL(teacher || student) in nats per token, [t]; arguments as `pair`."""


@dataclass(frozen=True)
class _Columns(ABC):
    """Tensors with one entry per token in their first axis."""

    def __getitem__(self, chosen: slice | Tensor) -> Self:
        return type(self)(*(getattr(self, column.name)[chosen] for column in fields(self)))

    @classmethod
    def joined(cls, signals: Sequence[Self]) -> Self:
        """The signals of several rows, one after the other."""
        return cls(*(torch.cat([getattr(signal, column.name) for signal in signals]) for column in fields(cls)))

    @property
    @abstractmethod
    def ids(self) -> Tensor:
        """As `Signal.ids`."""

    @abstractmethod
    def pair(self, student: LogitView, temperature: float) -> tuple[Tensor, Tensor]:
        """As `Signal.pair`."""

    def forward_kl(self, student: LogitView, temperature: float) -> Tensor:
        return forward_kl(*self.pair(student, temperature))


@dataclass(frozen=True)
class TeacherSignal(_Columns):
    """The teacher's top-k and its exact tail at one temperature."""

    indices_SK: Tensor  # int64
    logprobs_SK: Tensor  # float32 nats, at T = 1
    tail_logmass_S: Tensor  # float32 nats, at the temperature that was asked for

    @property
    def ids(self) -> Tensor:
        return self.indices_SK

    def pair(self, student: LogitView, temperature: float) -> tuple[Tensor, Tensor]:
        return coarse_pair(student, self.indices_SK, self.logprobs_SK, self.tail_logmass_S, temperature)


@dataclass(frozen=True)
class HeadSignal(_Columns):
    """The teacher's top-k from a cache that has lost the tail (an import of another tool's file).

    Both sides are compared given that the token is one of the k. That is exact at every temperature, and blind to the mass
    outside, which is why `moe-edge logits capture` stores it.
    """

    indices_SK: Tensor  # int64
    logprobs_SK: Tensor  # float32 nats, at T = 1

    @property
    def ids(self) -> Tensor:
        return self.indices_SK

    def pair(self, student: LogitView, temperature: float) -> tuple[Tensor, Tensor]:
        return head_pair(student, self.indices_SK, self.logprobs_SK, temperature)


@dataclass(frozen=True)
class SampledSignal(_Columns):
    """Draws from the teacher at the temperature that was asked for: unbiased, but for the forward KL alone."""

    indices_SU: Tensor  # int64
    counts_SU: Tensor  # int64, 0 = no draw
    entropy_S: Tensor  # float32 nats, of the teacher

    @property
    def ids(self) -> Tensor:
        return self.indices_SU.masked_fill(self.counts_SU == 0, -1)

    @classmethod
    def joined(cls, signals: Sequence[Self]) -> Self:
        """As every signal; rows with fewer unique draws are filled up."""
        width = max(signal.indices_SU.shape[1] for signal in signals)

        def padded(columns_SU: Tensor) -> Tensor:
            return functional.pad(columns_SU, (0, width - columns_SU.shape[1]))

        return super().joined(
            [cls(padded(signal.indices_SU), padded(signal.counts_SU), signal.entropy_S) for signal in signals]
        )

    def pair(self, student: LogitView, temperature: float) -> tuple[Tensor, Tensor]:
        raise ConfigError(
            "a loss needs the teacher's distribution, and the logit cache holds random draws",
            where="distill.stages: losses",
            why="draws give an unbiased gradient of the forward KL only",
            next_command="use the loss 'kl' alone, or capture again without --rs",
        )

    def forward_kl(self, student: LogitView, temperature: float) -> Tensor:
        return sampled_kl(student, self.indices_SU, self.counts_SU, self.entropy_S, temperature)


def joined(signals: Sequence[Any]) -> Any:
    """The signals of several rows of one source, one after the other, whatever their form."""
    return type(signals[0]).joined(signals)


class SignalSource(Protocol):
    """Anything that can say what the teacher thinks of a row."""

    def signal(self, ids_S: Tensor, temperature: float) -> Any: ...


class CachedSignal(Closing):
    """The teacher's signal from a logit cache: one HDF5 file, or the folder of shards of a capture. A context manager.

    Args:
        path: the file or the folder.
        expected: identity entries (of a folder: pins) that must match, for example the teacher's digest.

    Raises:
        InputRejected: no cache, or another teacher's.
    """

    def __init__(self, path: Path, expected: dict[str, Any]) -> None:
        self._cache = ShardedLogits(path, expected) if path.is_dir() else LogitCache(path, expected)

    @property
    def temperatures(self) -> tuple[float, ...]:
        return self._cache.temperatures

    @property
    def k(self) -> int:
        """Kept ids per token, or draws."""
        codec = self._cache.codec
        return codec.draws if isinstance(codec, SampledCodec) else codec.k

    @property
    def vocab(self) -> int:
        return self._cache.codec.vocab

    @property
    def description(self) -> str:
        """What the signal is, for reports."""
        if isinstance(self._cache.codec, SampledCodec):
            return f"{self.k} draws per token from the teacher"
        return f"cached top-{self.k} " + ("and tail bucket of the teacher" if self.temperatures else "without its tail")

    def require(self, temperature: float) -> None:
        """Raises ConfigError when the cache says nothing at this temperature."""
        try:
            if self.temperatures:
                temperature_index(temperature, self.temperatures)
        except ConfigError as error:
            if isinstance(self._cache, LogitCache):  # of a profile, whose configuration the error names
                raise
            raise self._unknown(temperature) from error

    def _unknown(self, temperature: float) -> ConfigError:
        """What to do about a capture without this temperature; it is made anew, or another temperature is trained at."""
        stored = ",".join(f"{one:g}" for one in self.temperatures)
        if isinstance(self._cache.codec, SampledCodec):
            why = f"its {self.k} draws per token were made at T = {stored}, and the held-out KL is taken at T = 1"
            command = "set distill.temperature=1 and no other in distill.stages"
            if self.temperatures != (1.0,):
                command += f", and capture again with --rs {self.k} --temperatures 1"
        else:
            why = f"exact tail masses are stored for {stored} only"
            wanted = ",".join(f"{one:g}" for one in sorted({temperature, *self.temperatures}))
            command = f"set distill.temperature to one of these, or capture again with --temperatures {wanted}"
        what = f"temperature {temperature:g} is not in the capture"
        return ConfigError(what, where=f"distill.data: {self._cache.path}", why=why, next_command=command)

    def signal(self, ids_S: Tensor, temperature: float) -> "TeacherSignal | HeadSignal | SampledSignal":
        """The signal of one row on the device of its ids.

        Raises:
            ConfigError: the cache says nothing at this temperature.
            InputRejected: the row is not in the cache.
        """
        self.require(temperature)
        row = self._cache.row(ids_S.cpu().numpy())
        if isinstance(row, SampledRow):
            return SampledSignal(*_tensors(ids_S.device, row.indices_SU, row.counts_SU, row.entropy_S))
        if not self.temperatures:
            return HeadSignal(*_tensors(ids_S.device, row.indices_SK, row.logprobs_SK))
        tail_S = row.tail_logmass_SH[:, temperature_index(temperature, self.temperatures)].copy()
        return TeacherSignal(*_tensors(ids_S.device, row.indices_SK, row.logprobs_SK, tail_S))

    def close(self) -> None:
        self._cache.close()


def _tensors(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array).to(device) for array in arrays]
