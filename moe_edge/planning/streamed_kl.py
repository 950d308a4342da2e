"""Masked KL of a teacher larger than memory: every choice's rows through one layer, then the next layer is read.

The numbers are those of masking.py, up to rounding. Between layers the residual stream of every choice waits on disk;
each layer is read once for all of them. What needs the whole model in memory at every step, a search by swaps or the
measurement of a quantization, has no such form and is left out for such a teacher.

Shape suffixes: C choices, B rows of a batch, N all rows, S tokens of a row, D model width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from moe_edge.models.pruning import NeuronMask, check_kept, masked, masked_neurons
from moe_edge.models.streaming import StreamedModel
from moe_edge.models.taps import head
from moe_edge.planning.masking import Kept, MaskedKl, distinct_choices, row_kl, summarise
from moe_edge.process.progress import track
from moe_edge.storage.rows import Spill

BATCH_ROWS = 4


def streamed_masked_kl(
    teacher: StreamedModel,
    choices: Mapping[str, Kept],
    ids_NS: Tensor,
    scratch: Path,
    top_k: int | None = None,
    neurons: NeuronMask | None = None,
) -> dict[str, MaskedKl]:
    """The cost of named choices on the same rows; as `masking.masked_kl`.

    Args:
        scratch: a folder with room for (C + 2) N S D float32 numbers; nothing stays there.
    """
    distinct, place = distinct_choices(choices)
    kl_CN = streamed_masked_kl_rows(teacher, distinct, ids_NS, scratch, top_k, neurons)
    return {name: summarise(kl_CN[index], ids_NS.numel()) for name, index in place.items()}


def streamed_masked_kl_rows(
    teacher: StreamedModel,
    choices: Sequence[Kept],
    ids_NS: Tensor,
    scratch: Path,
    top_k: int | None = None,
    neurons: NeuronMask | None = None,
) -> Tensor:
    """Mean KL(teacher || masked teacher) of every row under every choice, [C, N] float64 nats.

    Raises:
        ConfigError: see `pruning.check_kept`.
    """
    for kept in choices:
        check_kept(teacher.model, kept, top_k, uniform=False)
    runs = [_Run(scratch / f"masked-{number}.f32", ids_NS.long(), teacher) for number in range(len(choices) + 1)]
    with torch.inference_mode():
        with teacher.loaded("embedding"):
            for run in runs:
                run.begin()
        for layer in track(range(len(teacher.layers)), "masked KL, layer by layer"):
            with teacher.loaded(layer):
                runs[0].step(layer)  # the teacher as it is
                for run, kept in zip(runs[1:], choices, strict=True):
                    only_here = {layer: kept[layer]} if layer in kept else {}
                    with ExitStack() as undo:
                        undo.enter_context(masked(teacher.model, only_here, top_k))
                        if neurons is not None:
                            undo.enter_context(masked_neurons(teacher.model, neurons))
                        run.step(layer)
        with teacher.loaded("head"):
            kl_CN = _compare(runs)
    for run in runs:
        run.path.unlink()
    return kl_CN


class _Run:
    """The residual stream of all rows under one choice, on disk."""

    def __init__(self, path: Path, ids_NS: Tensor, teacher: StreamedModel) -> None:
        self.path, self.teacher, self.batches = path, teacher, torch.split(ids_NS, BATCH_ROWS)
        self.shape = (ids_NS.shape[1], teacher.width)

    def begin(self) -> None:
        """Write what the first layer reads."""
        with Spill(self.path, self.shape, write=True) as taken:
            for ids_BS in self.batches:
                taken.append(self.teacher.embed(ids_BS))

    def step(self, layer: int) -> None:
        """Let all rows through a layer that is in memory."""
        beside = self.path.with_suffix(".next")
        with Spill(beside, self.shape, write=True) as taken:
            for ids_BS, given_BSD in self.rows():
                taken.append(self.teacher.step(layer, ids_BS, given_BSD))
        beside.replace(self.path)

    def rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids [B, S], stream [B, S, D]) of every batch."""
        place = 0
        with Spill(self.path, self.shape) as given:
            for ids_BS in self.batches:
                yield ids_BS, given.rows(place, place + len(ids_BS))
                place += len(ids_BS)

    def logits(self) -> Iterator[Tensor]:
        """The logits [S, V] of every row, float32; needs the head."""
        for ids_BS, given_BSD in self.rows():
            for hidden_SD in self.teacher.finish(ids_BS, given_BSD):
                yield head(self.teacher.model)(hidden_SD).float()


def _compare(runs: Sequence[_Run]) -> Tensor:
    """KL of the first run's logits to each other's, row by row, [C, N]."""
    rows = [
        torch.cat([row_kl(teacher_SV[None], other_SV[None]) for other_SV in others])
        for teacher_SV, *others in zip(*(run.logits() for run in runs), strict=True)
    ]
    return torch.stack(rows, dim=1)
