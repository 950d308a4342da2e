"""What a loss may ask of a student's logits, whether they are all there or only what a loss on a few ids needs of them.

A cached teacher speaks of K ids and of everything else as one outcome; the cross-entropy speaks of one. For these the
logits of those ids and a log-sum-exp of all others are enough, and `head_tiles.kept_logits` finds them without the whole
vocabulary ever being in memory. A teacher in memory speaks of every token, and only `WholeLogits` will do.

Shape suffixes: T tokens, V vocabulary, K kept ids per token, H temperatures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class LogitView(Protocol):
    """A student's logits on some tokens; every answer is differentiable and in float32, or wider where the logits are."""

    @property
    def vocab(self) -> int: ...

    def at(self, ids_TK: Tensor) -> Tensor:
        """The logits of some ids, [T, K]."""

    def log_rest(self, ids_TK: Tensor, temperature: float) -> Tensor:
        """log sum exp(z / temperature) over all other ids, [T]; -inf where there are none."""

    def log_all(self, temperature: float) -> Tensor:
        """log sum exp(z / temperature) over the vocabulary, [T]."""

    def cross_entropy(self, labels_T: Tensor) -> Tensor:
        """-log softmax(z)[label] in nats, [T]."""


@dataclass(frozen=True)
class WholeLogits:
    """All logits, padding columns already dropped."""

    logits_TV: Tensor

    @property
    def vocab(self) -> int:
        return self.logits_TV.shape[-1]

    def at(self, ids_TK: Tensor) -> Tensor:
        return wide(self.logits_TV).gather(-1, ids_TK)

    def log_rest(self, ids_TK: Tensor, temperature: float) -> Tensor:
        return torch.logsumexp((wide(self.logits_TV) / temperature).scatter(-1, ids_TK, -torch.inf), -1)

    def log_all(self, temperature: float) -> Tensor:
        return torch.logsumexp(wide(self.logits_TV) / temperature, -1)

    def cross_entropy(self, labels_T: Tensor) -> Tensor:
        return functional.cross_entropy(wide(self.logits_TV), labels_T, reduction="none")


@dataclass(frozen=True)
class KeptLogits:
    """The logits of the ids that a loss is about, of the labels, and the log-sum-exp of everything but those ids.

    `ids_TK` are unique per token, and -1 is no id (its logit here means nothing). It answers for these ids only.
    """

    vocab: int
    ids_TK: Tensor
    logits_TK: Tensor
    label_T: Tensor  # logits of the labels; empty without labels
    log_rest_TH: Tensor  # at each of the temperatures
    temperatures: Sequence[float]

    def at(self, ids_TK: Tensor) -> Tensor:
        self._require_same(ids_TK)
        return self.logits_TK

    def log_rest(self, ids_TK: Tensor, temperature: float) -> Tensor:
        self._require_same(ids_TK)
        return self.log_rest_TH[:, self.temperatures.index(temperature)]

    def log_all(self, temperature: float) -> Tensor:
        rest_T = self.log_rest_TH[:, self.temperatures.index(temperature)]
        kept_TK = (self.logits_TK / temperature).masked_fill(self.ids_TK < 0, -torch.inf)
        return torch.logsumexp(torch.cat([kept_TK, rest_T[:, None]], -1), -1)

    def cross_entropy(self, labels_T: Tensor) -> Tensor:
        """Of the labels that the view was made for."""
        return self.log_all(1.0) - self.label_T

    def _require_same(self, ids_TK: Tensor) -> None:
        if ids_TK.shape != self.ids_TK.shape:
            raise ValueError(f"the view knows other ids: {tuple(self.ids_TK.shape)}, asked: {tuple(ids_TK.shape)}")


def wide(values: Tensor) -> Tensor:
    """In float32, or as they are where they are float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
