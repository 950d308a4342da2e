"""The losses of distillation as rows of a table, and how they are blended.

total = (1 - alpha) w_ce CE + alpha T^2 sum_d w_d D_d(teacher_T, student_T) + sum_o w_o L_o

with a divergence D (KL, reverse KL, ...) and other losses L on features, experts and routers. The factor T^2 keeps the
gradient of a divergence at the size of the cross-entropy's when T rises (Hinton et al. 2015, section 2.1). A loss whose
weight comes out as 0 is not computed at all, so that alpha = 0 is plain fine-tuning and alpha = 1 is pure distillation
exactly, not up to round-off. Losses on logits are means over all valid tokens of an optimizer step, however they are
split into micro-batches.

Full logits are never all in memory: where a cached teacher or the text is compared they are made in tiles of tokens and
vocabulary, where a teacher in memory speaks of the whole vocabulary, for some tokens at a time.

Shape suffixes: T tokens, t tokens of a chunk, V vocabulary, D model, K kept ids.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.signal import Signal
from moe_edge.formulas.head_loss import head_loss
from moe_edge.formulas.head_tiles import kept_logits
from moe_edge.formulas.logit_views import LogitView, WholeLogits
from moe_edge.formulas.pair_divergence import divergences

Kind = Literal["labels", "divergence", "term"]
Divergences = Mapping[str, Callable[[Tensor, Tensor], Tensor]]


def _once(alpha: float, temperature: float) -> float:
    return 1.0


def _blended(alpha: float, temperature: float) -> float:
    return alpha * temperature**2


@dataclass(frozen=True)
class LossRow:
    """One loss: what it is computed from, and its factor in the blend as a function of (alpha, temperature)."""

    kind: Kind
    factor: Callable[[float, float], float]
    teacher: bool = False  # only a live teacher can serve it


LOSSES: dict[str, LossRow] = {
    "ce": LossRow("labels", lambda alpha, temperature: 1.0 - alpha),
    "kl": LossRow("divergence", _blended),
    "reverse_kl": LossRow("divergence", _blended),
    "jsd": LossRow("divergence", _blended),
    "skew_kl": LossRow("divergence", _blended),
    "skew_reverse_kl": LossRow("divergence", _blended),
    "tvd": LossRow("divergence", _blended),
    "cka": LossRow("term", _once, teacher=True),
    "mse": LossRow("term", _once, teacher=True),
    "cosine": LossRow("term", _once, teacher=True),
    "procrustes": LossRow("term", _once, teacher=True),
    "expert_cka": LossRow("term", _once, teacher=True),
    "expert_diversity": LossRow("term", _once),
    "load_balance": LossRow("term", _once),
    "importance": LossRow("term", _once),
    "router_z": LossRow("term", _once),
    "routing_kl": LossRow("term", _once, teacher=True),
    "uld": LossRow("term", _blended, teacher=True),  # this and the next: cross_tokenizer.py
    "projected_kl": LossRow("term", _blended, teacher=True),
}


def active_weights(weights: Mapping[str, float], alpha: float, temperature: float) -> dict[str, float]:
    """{loss: its whole factor in the total}, only those that are not 0.

    Raises:
        ConfigError: an unknown loss, a negative weight, or nothing is left to train on.
    """
    where = "distill.stages: losses"
    unknown = sorted(set(weights) - set(LOSSES))
    if unknown:
        raise ConfigError(f"there is no loss '{unknown[0]}'", where=where, why=f"known: {', '.join(LOSSES)}")
    negative = sorted(name for name, weight in weights.items() if weight < 0)
    if negative:
        raise ConfigError(f"the weight of the loss '{negative[0]}' is negative", where=where)
    blended = {name: weight * LOSSES[name].factor(alpha, temperature) for name, weight in weights.items()}
    active = {name: weight for name, weight in blended.items() if weight > 0}
    if not active:
        why = f"with alpha {alpha:g} the losses {dict(weights)} all have the weight 0"
        raise ConfigError("a stage has no loss to train on", where=f"{where}, distill.alpha", why=why)
    return active


def of_kind(weights: Mapping[str, float], *kinds: Kind) -> dict[str, float]:
    """The losses of some kinds."""
    return {name: weight for name, weight in weights.items() if LOSSES[name].kind in kinds}


@dataclass(frozen=True)
class TokenLosses:
    """The losses on logits of one stage.

    `weights` come from `active_weights`; losses on anything else are ignored here.
    """

    weights: Mapping[str, float]
    temperature: float
    jsd_beta: float = 0.5
    skew: float = 0.1

    def __call__(
        self, hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor | None, signals: Sequence[Signal]
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum over tokens, and each loss's own sum (unweighted, nats; a divergence without its T^2).

        Args:
            hidden_TD: final hidden states of tokens that have a label.
            head_VD: the head's weight, cut to the true vocabulary.
            labels_T: None leaves the cross-entropy out.
            signals: the teacher on the same tokens, once per draw; a divergence is their mean.
        """

        ids_TK = _ids_enough(hidden_TD, signals)
        if ids_TK is None:
            return head_loss(
                hidden_TD, head_VD, lambda logits_tV, span: self._on_chunk(logits_tV, span, labels_T, signals)
            )
        wanted = labels_T if "ce" in self.weights else None
        temperatures = sorted({self.temperature, *([] if wanted is None else [1.0])})
        student = kept_logits(hidden_TD, head_VD, ids_TK, temperatures, wanted)
        sums = self._sums(student, labels_T, signals)
        total = torch.stack([self.weights[name] * value for name, value in sums.items()]).sum()
        return total, {name: float(value.detach()) for name, value in sums.items()}

    def _on_chunk(
        self, logits_tV: Tensor, span: slice, labels_T: Tensor | None, signals: Sequence[Signal]
    ) -> dict[str, tuple[float, Tensor]]:
        labels_t = None if labels_T is None else labels_T[span]
        sums = self._sums(WholeLogits(logits_tV), labels_t, [signal[span] for signal in signals])
        return {name: (self.weights[name], value) for name, value in sums.items()}

    def _sums(self, student: LogitView, labels_T: Tensor | None, signals: Sequence[Signal]) -> dict[str, Tensor]:
        """Summed over the tokens."""
        sums: dict[str, Tensor] = {}
        if "ce" in self.weights and labels_T is not None:
            sums["ce"] = student.cross_entropy(labels_T).sum()
        for signal in signals:
            for name, value in self._divergences(student, signal).items():
                sums[name] = sums.get(name, 0.0) + value / len(signals)
        return sums

    def _divergences(self, student: LogitView, signal: Signal) -> dict[str, Tensor]:
        """Only the forward KL works with every kind of signal."""
        known, sums = divergences(self.jsd_beta, self.skew), {}
        if "kl" in self.weights:
            sums["kl"] = signal.forward_kl(student, self.temperature).sum()
        others = [name for name in self.weights if name in known]
        if others:
            pair = signal.pair(student, self.temperature)
            sums |= {name: known[name](*pair).sum() for name in others}
        return sums


def _ids_enough(hidden_TD: Tensor, signals: Sequence[Signal]) -> Tensor | None:
    """The ids whose logits are enough for all signals; None: whole logits are needed."""
    if not signals:
        return torch.empty((len(hidden_TD), 0), dtype=torch.long, device=hidden_TD.device)
    return signals[0].ids if len(signals) == 1 else None
