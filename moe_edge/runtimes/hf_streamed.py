"""A student larger than memory as a reference: its logits and router gaps, one layer in memory at a time.

`routing_gaps` lets all rows through the model together, so that the checkpoint is read once for all of them; then `logits` of a
row that was read costs the head alone. The residual stream stays in memory: some hundred rows of it are small beside one
layer. It decodes nothing: each new token would read the whole checkpoint again.

Shape suffixes: B rows of one length, S tokens of a row, D model width, V vocabulary, T tokens of a batch.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_edge.models.routing import watched_gaps
from moe_edge.models.streaming import StreamedModel
from moe_edge.models.students import is_mixture
from moe_edge.models.taps import head
from moe_edge.process.placement import fits_in_memory
from moe_edge.process.progress import track
from moe_edge.runtimes.base import checked_tokens
from moe_edge.runtimes.hf import HfRuntime
from moe_edge.runtimes.hf_batch import batches_by_length
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.files import Closing


class StreamedStudent(Closing):
    """A checkpoint folder in float32 arithmetic, experts held as they are stored; a context manager.

    Args:
        path: the checkpoint folder.
        threads: torch threads while open (0 = leave as they are); closing restores the old number.
        context_length: tokens of the longest row.

    Raises:
        ConfigError: no such folder.
        InputRejected: it cannot be loaded.
    """

    name = "hf, layer by layer"

    def __init__(self, path: Path, threads: int, context_length: int) -> None:
        self.path, self.context_length = Path(path), context_length
        self._model = StreamedModel(self.path, compact=True)
        self.vocab: int = self._model.model.config.vocab_size
        self._hidden_SD: dict[bytes, Tensor] = {}  # the head's input of every row that was read
        self._head = ExitStack()
        self._old_threads = torch.get_num_threads()
        if threads:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def routing_gaps(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Read all rows in one pass over the checkpoint; rows of an earlier call are forgotten.

        Returns:
            Each row's routing gaps [S], as `HfRuntime.routing_gaps`.

        Raises:
            ConfigError: a row is empty, too long, or holds an unknown token.
        """
        self._head.close()
        given = [checked_tokens(row, 0, self.context_length, self.vocab, self.path) for row in rows]
        batches = batches_by_length(given)
        ids = [torch.from_numpy(np.stack([given[row] for row in batch])) for batch in batches]
        hidden, gaps = self._through_layers(ids)
        found: list[np.ndarray] = [np.empty(0)] * len(rows)
        self._hidden_SD = {}
        for batch, ids_BS, hidden_BSD, gap_BS in zip(batches, ids, hidden, gaps, strict=True):
            for place, row in enumerate(batch):
                self._hidden_SD[ids_BS[place].numpy().tobytes()] = hidden_BSD[place]
                found[row] = gap_BS[place].numpy()
        self._head.enter_context(self._model.loaded("head"))
        return found

    @torch.inference_mode()
    def logits(self, ids_S: np.ndarray) -> np.ndarray:
        """Logits [S, V] float32 of every position; a row that was not read yet is read now, with its errors."""
        key = np.ascontiguousarray(ids_S, dtype=np.int64).tobytes()
        if key not in self._hidden_SD:
            self.routing_gaps([ids_S])
        logits_SV: np.ndarray = head(self._model.model)(self._hidden_SD[key]).float().numpy()
        return logits_SV

    def close(self) -> None:
        """Free what is in memory, close the files and restore the thread count."""
        self._head.close()
        self._hidden_SD = {}
        self._model.close()
        torch.set_num_threads(self._old_threads)

    def _through_layers(self, ids: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(the head's input [B, S, D], smallest gaps [B, S]) of every batch of ids [B, S]."""
        streamed, mixture = self._model, is_mixture(self._model.model)
        smallest = [torch.full(ids_BS.shape, torch.inf) for ids_BS in ids]
        with streamed.loaded("embedding"):
            hidden = [streamed.embed(ids_BS) for ids_BS in ids]
        for layer in track(range(len(streamed.layers)), "the student, layer by layer"):
            with streamed.loaded(layer), ExitStack() as undo:
                gaps_T = undo.enter_context(watched_gaps(streamed.model)) if mixture else []
                for number, ids_BS in enumerate(ids):
                    gaps_T.clear()
                    hidden[number] = streamed.step(layer, ids_BS, hidden[number])
                    for gap_T in gaps_T:
                        smallest[number] = torch.minimum(smallest[number], gap_T.view(ids_BS.shape).float())
        return [streamed.finish(*pair) for pair in zip(ids, hidden, strict=True)], smallest


def open_student(path: Path, threads: int, context_length: int) -> HfRuntime | StreamedStudent:
    """The checkpoint as a reference in float32: whole where it fits into memory now, or else layer by layer.

    Raises:
        ConfigError: no such folder.
        InputRejected: it cannot be loaded.
    """
    fits = fits_in_memory(inspect_checkpoint(Path(path), require_tokenizer=False), torch.float32)
    return (HfRuntime if fits else StreamedStudent)(path, threads, context_length)
