"""The teacher as a stream of logits, row after row: whole in memory, or layer by layer where it does not fit.

Both give the same rows in the same order, in batches that never cross a part, so that what a shard holds depends on
its own rows alone, however many shards are read together or by how many processes.

Shape suffixes: N rows, B rows of a batch, S tokens of a row, D model width, V vocabulary.
"""

import tempfile
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_edge.distillation.teacher import LiveTeacher, teacher_model
from moe_edge.distillation.terms import Needs
from moe_edge.models.streaming import StreamedModel
from moe_edge.models.taps import head
from moe_edge.storage.files import Closing
from moe_edge.storage.rows import SPILL_ITEM_BYTES, Spill

BATCH_ROWS = 4
SPILL_BYTES = 8 * 2**30  # of the residual stream on disk, while a streamed teacher reads a group of rows
WARM_UP_TOKENS = 8


class LogitReader(Closing):
    """A teacher that reads rows; a context manager."""

    @abstractmethod
    def group_rows(self, row_tokens: int) -> int:
        """How many rows are best given to one call of `logits`; at least 1."""

    @abstractmethod
    def logits(self, parts: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """The logits [S, V] of every row of all parts [N, S], in order, on the teacher's device."""

    @abstractmethod
    def trial(self, ids_S: np.ndarray, rows: int) -> tuple[float, Tensor | None]:
        """(seconds that `rows` rows will take, from a measured forward of this one; its logits where they were made)."""


def batches(parts: Sequence[np.ndarray]) -> Iterator[Tensor]:
    """The ids [B, S] of all parts in turn; a batch lies in one part."""
    for ids_NS in parts:
        for start in range(0, len(ids_NS), BATCH_ROWS):
            yield torch.from_numpy(np.ascontiguousarray(ids_NS[start : start + BATCH_ROWS])).long()


class WholeReader(LogitReader):
    """The whole teacher in memory."""

    def __init__(self, teacher: Path, dtype: torch.dtype, device: torch.device, vocab: int) -> None:
        self._teacher = LiveTeacher(teacher_model(teacher, device, dtype), Needs())
        self._device, self._vocab = device, vocab

    def group_rows(self, row_tokens: int) -> int:
        return 1

    def logits(self, parts: Sequence[np.ndarray]) -> Iterator[Tensor]:
        for ids_BS in batches(parts):
            yield from self._teacher.logits(ids_BS.to(self._device), self._vocab)

    def trial(self, ids_S: np.ndarray, rows: int) -> tuple[float, Tensor | None]:
        list(self.logits([ids_S[None, :WARM_UP_TOKENS]]))
        started = time.perf_counter()
        (logits_SV,) = self.logits([ids_S[None]])
        float(logits_SV[-1, -1])  # waits for the accelerator
        return rows * (time.perf_counter() - started), logits_SV

    def close(self) -> None:
        self._teacher.forget()


class StreamedReader(LogitReader):
    """One layer in memory at a time; the residual stream of a group of rows waits on disk."""

    def __init__(self, teacher: Path, dtype: torch.dtype, device: torch.device, vocab: int, scratch: Path) -> None:
        self._model = StreamedModel(teacher, dtype, device, compact=True)
        self._vocab, self._scratch = vocab, scratch

    def group_rows(self, row_tokens: int) -> int:
        return max(1, SPILL_BYTES // (row_tokens * self._model.width * SPILL_ITEM_BYTES))

    @torch.inference_mode()
    def logits(self, parts: Sequence[np.ndarray]) -> Iterator[Tensor]:
        shape = (parts[0].shape[1], self._model.width)
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix=".spill-") as folder:
            files = [Path(folder) / "even.f32", Path(folder) / "odd.f32"]
            with self._model.loaded("embedding"), Spill(files[0], shape, write=True) as taken:
                for ids_BS in batches(parts):
                    taken.append(self._model.embed(ids_BS))
            for layer in range(len(self._model.layers)):
                self._pass(layer, parts, *files)
                files.reverse()
            with self._model.loaded("head"), Spill(files[0], shape) as given:
                for ids_BS, hidden_BSD in _beside(parts, given):
                    for hidden_SD in self._model.finish(ids_BS, hidden_BSD):
                        yield head(self._model.model)(hidden_SD)[:, : self._vocab]

    def _pass(self, layer: int, parts: Sequence[np.ndarray], source: Path, target: Path) -> None:
        shape = (parts[0].shape[1], self._model.width)
        with self._model.loaded(layer), Spill(source, shape) as given, Spill(target, shape, write=True) as taken:
            for ids_BS, hidden_BSD in _beside(parts, given):
                taken.append(self._model.step(layer, ids_BS, hidden_BSD))

    @torch.inference_mode()
    def trial(self, ids_S: np.ndarray, rows: int) -> tuple[float, Tensor | None]:
        """Measured: reading the first and the last layer, and one row through each; all others are taken as alike."""
        ids_BS = torch.from_numpy(ids_S[None].copy()).long()
        groups, layers = -(-rows // self.group_rows(len(ids_S))), len(self._model.layers)
        with self._model.loaded("embedding"):
            hidden_BSD = self._model.embed(ids_BS)
        load_s, step_s = 0.0, 0.0
        for layer in (0, layers - 1):
            started = time.perf_counter()
            with self._model.loaded(layer):
                load_s += time.perf_counter() - started
                started = time.perf_counter()
                float(self._model.step(layer, ids_BS, hidden_BSD).sum())
                step_s += time.perf_counter() - started
        return layers / 2 * (groups * load_s + rows * step_s), None

    def close(self) -> None:
        self._model.close()


def _beside(parts: Sequence[np.ndarray], given: Spill) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids [B, S], hidden [B, S, D]) of every batch."""
    place = 0
    for ids_BS in batches(parts):
        yield ids_BS, given.rows(place, place + len(ids_BS))
        place += len(ids_BS)
