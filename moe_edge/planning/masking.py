"""Masked KL: what dropping experts costs, measured in the teacher before a single weight is changed.

Masking lets the router see only the kept rows, which gives the pruned model's logits exactly. All choices are judged
on the same rows; the loop over rows is outermost, so the teacher's logits live for one batch of rows only and memory
does not grow with the number of tokens or choices.

Shape suffixes: C choices, N rows, S tokens of a row, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.formulas.divergence import kl_dense
from moe_edge.metrics.quality import bootstrap_ci95
from moe_edge.models.pruning import NeuronMask, masked, masked_neurons
from moe_edge.process.progress import track

Kept = Mapping[int, Sequence[int]]
BATCH_LOGITS = 1 << 25  # float32 logits of one batch of rows: 128 MiB


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


def masked_kl_rows(
    model: PreTrainedModel,
    choices: Sequence[Kept],
    ids_NS: Tensor,
    top_k: int | None = None,
    neurons: NeuronMask | None = None,
) -> Tensor:
    """Mean KL(teacher || masked teacher) of every row under every choice.

    Args:
        choices: layer -> kept expert ids; an absent layer keeps all.
        ids_NS: token ids.
        top_k: the student's, where it differs from the teacher's.
        neurons: those that stay, where the student's experts are narrower; the teacher's logits are of all of them.

    Returns:
        [C, N] float64, nats per token.
    """
    batches = batches_of(model, ids_NS)
    kl_CN = [[] for _ in choices]
    work = ((batch, index) for batch in batches for index in range(-1, len(choices)))
    teacher_NSV = torch.empty(0)
    with torch.no_grad():
        for batch_NS, index in track(work, "masked KL", total=len(batches) * (len(choices) + 1)):
            if index < 0:
                teacher_NSV = logits_of(model, batch_NS)
                continue
            with ExitStack() as undo:
                undo.enter_context(masked(model, choices[index], top_k))
                if neurons is not None:
                    undo.enter_context(masked_neurons(model, neurons))
                kl_CN[index].append(row_kl(teacher_NSV, logits_of(model, batch_NS)))
    return torch.stack([torch.cat(parts) for parts in kl_CN])


def batches_of(model: PreTrainedModel, ids_NS: Tensor) -> tuple[Tensor, ...]:
    """The rows in batches whose logits take BATCH_LOGITS at most, or one row."""
    return ids_NS.long().split(max(1, BATCH_LOGITS // (ids_NS.shape[1] * model.config.vocab_size)))


def logits_of(model: PreTrainedModel, ids_NS: Tensor) -> Tensor:
    """[N, S, V] float32."""
    return model(input_ids=ids_NS.to(model.device), use_cache=False).logits.float()


def row_kl(reference_NSV: Tensor, other_NSV: Tensor) -> Tensor:
    """Mean over tokens of KL(softmax(reference) || softmax(other)), [N] float64 nats."""
    pairs = zip(reference_NSV, other_NSV, strict=True)
    return torch.stack([kl_dense(reference_SV, other_SV).double().mean() for reference_SV, other_SV in pairs])


def masked_kl(
    model: PreTrainedModel,
    choices: Mapping[str, Kept],
    ids_NS: Tensor,
    top_k: int | None = None,
    neurons: NeuronMask | None = None,
) -> dict[str, MaskedKl]:
    """The cost of named choices on the same rows; equal choices are run once.

    Args as `masked_kl_rows`. Returns a result per name, in the given order.
    """
    distinct, place = distinct_choices(choices)
    kl_CN = masked_kl_rows(model, distinct, ids_NS, top_k, neurons)
    return {name: summarise(kl_CN[index], ids_NS.numel()) for name, index in place.items()}


def distinct_choices(choices: Mapping[str, Kept]) -> tuple[list[Kept], dict[str, int]]:
    """The choices without repetitions, and where each name's is among them."""
    distinct: list[Kept] = []
    place: dict[str, int] = {}
    for name, kept in choices.items():
        if kept not in distinct:
            distinct.append(kept)
        place[name] = distinct.index(kept)
    return distinct, place


def summarise(kl_N: Tensor, n_tokens: int) -> MaskedKl:
    """The cost of a choice from the mean KL of every row, all rows together having `n_tokens` tokens."""
    tokens_per_row = n_tokens // len(kl_N)
    interval = bootstrap_ci95((kl_N * tokens_per_row).tolist(), [tokens_per_row] * len(kl_N))
    return MaskedKl(float(kl_N.mean()), interval, n_tokens, tuple(kl_N.tolist()))
