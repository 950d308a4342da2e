"""Masked KL: what dropping experts costs, measured in the teacher before a single weight is changed.

Masking lets the router see only the kept rows, which gives the pruned model's logits exactly. All choices are judged on the
same rows. A `Scorer` measures it either way:

- `WholeScorer` holds the teacher. The loop over rows is outermost, so the teacher's logits live for one batch of rows only
  and memory does not grow with the number of tokens or choices.
- `StreamedScorer` reads a teacher larger than memory one layer at a time, once for all choices; between layers the residual
  stream of every choice waits on disk. The numbers are the same up to rounding. What needs the whole model at every step (a
  search by swaps, measuring a quantization, trying a refit) has no such form: `Scorer.model` is None there.

Units: KL in nats per token.
Shape suffixes: C choices, N rows, B rows of a batch, S tokens of a row, V vocabulary, D model width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.contracts.artifacts import Placement
from moe_edge.contracts.plan import KeptExperts
from moe_edge.contracts.row_split import RowSplit
from moe_edge.formulas.divergence import kl_dense
from moe_edge.metrics.quality import bootstrap_ci95
from moe_edge.models.loading import load_model
from moe_edge.models.pruning import NeuronMask, check_kept, masked, masked_neurons
from moe_edge.models.streaming import StreamedModel
from moe_edge.models.taps import head
from moe_edge.process.placement import DTYPES
from moe_edge.process.progress import track
from moe_edge.storage.rows import Spill

BATCH_LOGITS = 1 << 25  # float32 logits of one batch of rows: 128 MiB
STREAMED_BATCH_ROWS = 4


@dataclass(frozen=True)
class MaskedKl:
    """The cost of one choice."""

    kl_nats: float  # mean KL(teacher || masked teacher) per token
    ci95: tuple[float, float] | None  # bootstrap over rows; None with a single row
    n_tokens: int
    row_nats: tuple[float, ...] = ()  # mean of each row, for paired comparisons

    def clearly_below(self, other: "MaskedKl") -> bool:
        """Is this KL lower than the other on the same rows, beyond the 95 % interval of the paired difference?"""
        differences = [theirs - ours for ours, theirs in zip(self.row_nats, other.row_nats, strict=True)]
        interval = bootstrap_ci95(differences, [1] * len(differences))
        return other.kl_nats > self.kl_nats if interval is None else interval[0] > 0


class Scorer(ABC):
    """A teacher whose experts can be masked."""

    model: PreTrainedModel | None  # the teacher in memory; None where it is streamed

    def masked_kl(
        self,
        choices: Mapping[str, KeptExperts],
        ids_NS: Tensor,
        top_k: int | None = None,
        neurons: NeuronMask | None = None,
    ) -> dict[str, MaskedKl]:
        """The cost of named choices on the same rows, in the given order; equal choices are run once.

        Args:
            choices: name -> layer -> kept expert ids; an absent layer keeps all.
            ids_NS: token ids.
            top_k: the student's, where it differs from the teacher's.
            neurons: those that stay, where the student's experts are narrower; the teacher's logits are of all of them.

        Raises:
            ConfigError: see `pruning.check_kept`.
        """
        distinct, position_of = distinct_choices(choices)
        kl_CN = self._kl_rows(distinct, ids_NS, top_k, neurons)
        return {name: summarise(kl_CN[position], ids_NS.numel()) for name, position in position_of.items()}

    @abstractmethod
    def _kl_rows(
        self, choices: Sequence[KeptExperts], ids_NS: Tensor, top_k: int | None, neurons: NeuronMask | None
    ) -> Tensor:
        """Mean KL of every row under every choice, [C, N] float64."""


@dataclass(frozen=True)
class WholeScorer(Scorer):
    """A teacher in memory."""

    model: PreTrainedModel

    def _kl_rows(
        self, choices: Sequence[KeptExperts], ids_NS: Tensor, top_k: int | None, neurons: NeuronMask | None
    ) -> Tensor:
        return masked_kl_rows(self.model, choices, ids_NS, top_k, neurons)


@dataclass(frozen=True)
class StreamedScorer(Scorer):
    """A teacher read layer by layer."""

    streamed: StreamedModel
    scratch: Path  # a folder with room for (choices + 2) N S D float32 numbers; nothing stays there
    model: None = field(default=None, init=False)

    def _kl_rows(
        self, choices: Sequence[KeptExperts], ids_NS: Tensor, top_k: int | None, neurons: NeuronMask | None
    ) -> Tensor:
        return streamed_masked_kl_rows(self.streamed, choices, ids_NS, self.scratch, top_k, neurons)


@contextmanager
def open_scorer(teacher: Path, placement: Placement, scratch: Path) -> Iterator[Scorer]:
    """The teacher while the context is open.

    Args:
        teacher: a checkpoint's folder.
        placement: whole where the profile's rule holds the teacher in memory (profile.mode).
        scratch: where a temporary folder may be made, see `StreamedScorer`.

    Raises:
        InputRejected: as `models.loading.load_model`.
    """
    dtype = DTYPES[placement.dtype]
    if placement.whole:
        model = load_model(teacher, dtype=dtype)
        model.to(placement.device)  # type: ignore[arg-type]  # transformers hides nn.Module.to
        yield WholeScorer(model)
        return
    with (
        TemporaryDirectory(prefix="streams-", dir=scratch, ignore_cleanup_errors=True) as folder,
        StreamedModel(teacher, dtype, placement.device, compact=True) as streamed,
    ):
        yield StreamedScorer(streamed, Path(folder))


def distinct_choices(choices: Mapping[str, KeptExperts]) -> tuple[list[KeptExperts], dict[str, int]]:
    """The choices without repetitions, and each name's position among them."""
    distinct: list[KeptExperts] = []
    position_of: dict[str, int] = {}
    for name, kept in choices.items():
        if kept not in distinct:
            distinct.append(kept)
        position_of[name] = distinct.index(kept)
    return distinct, position_of


def summarise(kl_N: Tensor, n_tokens: int) -> MaskedKl:
    """The cost of a choice from the mean KL of every row, all rows together having `n_tokens` tokens."""
    tokens_per_row = n_tokens // len(kl_N)
    interval = bootstrap_ci95((kl_N * tokens_per_row).tolist(), [tokens_per_row] * len(kl_N))
    return MaskedKl(float(kl_N.mean()), interval, n_tokens, tuple(kl_N.tolist()))


@dataclass(frozen=True)
class JudgingRows:
    """The profile's rows: the last ones judge the candidates, the search may read the others."""

    judging_NS: Tensor  # int64, at least one row
    search_NS: Tensor
    note: str  # which rows judged, in a sentence


def judging_rows(ids_NS: Tensor, split: RowSplit, tokens: int) -> JudgingRows:
    """The rows of the calibration set that judge, and those that the search may read; see `RowSplit`.

    Args:
        ids_NS: all of them.
        tokens: plan.tokens.
    """
    judge, search = split.judge(tokens), split.search(tokens)
    note = (
        f"Masked KL on the calibration rows {judge.start}..{judge.stop - 1} of {split.rows} "
        f"({len(judge) * split.row_tokens} tokens); the profile's statistics saw these rows too, so the prediction is "
        "slightly optimistic on other text."
    )
    if split.shared:
        note += " There is only this one row, so that what is fitted on it is judged on it, too."
    return JudgingRows(ids_NS[judge.start : judge.stop], ids_NS[search.start : search.stop], note)


def first_rows(ids_NS: Tensor, tokens: int) -> Tensor:
    """The first rows that hold about `tokens` tokens, at least one."""
    return ids_NS[: max(1, tokens // ids_NS.shape[1])]


def masked_kl_rows(
    model: PreTrainedModel,
    choices: Sequence[KeptExperts],
    ids_NS: Tensor,
    top_k: int | None = None,
    neurons: NeuronMask | None = None,
) -> Tensor:
    """Mean KL(teacher || masked teacher) of every row under every choice, [C, N] float64; see `Scorer.masked_kl`."""
    batches = batches_of(model, ids_NS)
    kl_CN: list[list[Tensor]] = [[] for _ in choices]
    work = ((batch, index) for batch in batches for index in range(-1, len(choices)))
    teacher_NSV = torch.empty(0)
    with torch.no_grad():
        for batch_NS, index in track(work, "masked KL", total=len(batches) * (len(choices) + 1)):
            if index < 0:
                teacher_NSV = logits_of(model, batch_NS)
                continue
            with as_student(model, choices[index], top_k, neurons):
                kl_CN[index].append(row_kl(teacher_NSV, logits_of(model, batch_NS)))
    return torch.stack([torch.cat(parts) for parts in kl_CN])


@contextmanager
def as_student(
    model: PreTrainedModel, kept: KeptExperts, top_k: int | None, neurons: NeuronMask | None
) -> Iterator[None]:
    """While open, the model computes what it would with only these experts, this top-k and these neurons."""
    with ExitStack() as undo:
        undo.enter_context(masked(model, kept, top_k))
        if neurons is not None:
            undo.enter_context(masked_neurons(model, neurons))
        yield


def batches_of(model: PreTrainedModel, ids_NS: Tensor) -> tuple[Tensor, ...]:
    """The rows in batches whose logits take BATCH_LOGITS at most, or one row."""
    return torch.split(ids_NS.long(), max(1, BATCH_LOGITS // (ids_NS.shape[1] * model.config.vocab_size)))


def logits_of(model: PreTrainedModel, ids_NS: Tensor) -> Tensor:
    """[N, S, V] float32."""
    logits_NSV: Tensor = model(input_ids=ids_NS.to(model.device), use_cache=False).logits
    return logits_NSV.float()


def row_kl(reference_NSV: Tensor, other_NSV: Tensor) -> Tensor:
    """Mean over tokens of KL(softmax(reference) || softmax(other)), [N] float64 nats."""
    pairs = zip(reference_NSV, other_NSV, strict=True)
    return torch.stack([kl_dense(reference_SV, other_SV).double().mean() for reference_SV, other_SV in pairs])


def streamed_masked_kl_rows(
    teacher: StreamedModel,
    choices: Sequence[KeptExperts],
    ids_NS: Tensor,
    scratch: Path,
    top_k: int | None = None,
    neurons: NeuronMask | None = None,
) -> Tensor:
    """As `masked_kl_rows`, every layer read once for all choices, [C, N] float64.

    Args:
        scratch: see `StreamedScorer`.
    """
    for kept in choices:
        check_kept(teacher.model, kept, top_k, uniform=False)
    own, *others = (
        _ResidualStream(scratch / f"masked-{number}.f32", ids_NS.long(), teacher) for number in range(len(choices) + 1)
    )
    with torch.inference_mode():
        with teacher.loaded("embedding"):
            for stream in (own, *others):
                stream.embed()
        for layer in track(range(len(teacher.layers)), "masked KL, layer by layer"):
            with teacher.loaded(layer):
                own.through(layer)
                for stream, kept in zip(others, choices, strict=True):
                    only_here = {layer: kept[layer]} if layer in kept else {}
                    with as_student(teacher.model, only_here, top_k, neurons):
                        stream.through(layer)
        with teacher.loaded("head"):
            rows = [
                torch.cat([row_kl(teacher_SV[None], student_SV[None]) for student_SV in students])
                for teacher_SV, *students in zip(own.logits(), *(stream.logits() for stream in others), strict=True)
            ]
    for stream in (own, *others):
        stream.path.unlink()
    return torch.stack(rows, dim=1)


class _ResidualStream:
    """What lies between two layers for all rows under one choice, on disk."""

    def __init__(self, path: Path, ids_NS: Tensor, teacher: StreamedModel) -> None:
        self.path, self.teacher, self.batches = path, teacher, torch.split(ids_NS, STREAMED_BATCH_ROWS)
        self.row_shape = (ids_NS.shape[1], teacher.width)

    def embed(self) -> None:
        """Write what the first layer reads."""
        with Spill(self.path, self.row_shape, write=True) as written:
            for ids_BS in self.batches:
                written.append(self.teacher.embed(ids_BS))

    def through(self, layer: int) -> None:
        """Let all rows through a layer that is in memory."""
        beside = self.path.with_suffix(".next")
        with Spill(beside, self.row_shape, write=True) as written:
            for ids_BS, hidden_BSD in self._batches():
                written.append(self.teacher.step(layer, ids_BS, hidden_BSD))
        beside.replace(self.path)

    def logits(self) -> Iterator[Tensor]:
        """The logits [S, V] of every row, float32; needs the head."""
        for ids_BS, hidden_BSD in self._batches():
            for hidden_SD in self.teacher.finish(ids_BS, hidden_BSD):
                yield head(self.teacher.model)(hidden_SD).float()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids [B, S], stream [B, S, D]) of every batch."""
        first = 0
        with Spill(self.path, self.row_shape) as stored:
            for ids_BS in self.batches:
                yield ids_BS, stored.rows(first, first + len(ids_BS))
                first += len(ids_BS)
