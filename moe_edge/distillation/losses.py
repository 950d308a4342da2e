"""The losses of distillation as rows of a table, and how they are blended.

total = (1 - alpha) w_ce CE + alpha w_kl T^2 KL(teacher_T || student_T) + w_cka (1 - CKA)

The factor T^2 keeps the gradient of the KL at the size of the cross-entropy's when T rises (Hinton et al. 2015,
section 2.1). A loss whose weight comes out as 0 is not computed at all, so that alpha = 0 is plain fine-tuning and
alpha = 1 is pure distillation exactly, not up to round-off. CE and KL are means over all valid tokens of an optimizer
step, however they are split into micro-batches.

Shape suffixes: T tokens, t tokens of a chunk, V vocabulary, D model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.signal import TeacherSignal
from moe_edge.formulas.divergence import cached_kl, cross_entropy
from moe_edge.formulas.head_loss import head_loss

Need = Literal["labels", "signal", "features"]


@dataclass(frozen=True)
class LossRow:
    """One loss: what it needs, and its factor in the blend as a function of (alpha, temperature)."""

    needs: Need
    factor: Callable[[float, float], float]


LOSSES: dict[str, LossRow] = {
    "ce": LossRow("labels", lambda alpha, temperature: 1.0 - alpha),
    "kl": LossRow("signal", lambda alpha, temperature: alpha * temperature**2),
    "cka": LossRow("features", lambda alpha, temperature: 1.0),
}


def active_weights(weights: Mapping[str, float], alpha: float, temperature: float) -> dict[str, float]:
    """{loss: its whole factor in the total}, only those that are not 0.

    Raises:
        ConfigError: a negative weight, or nothing is left to train on.
    """
    negative = sorted(name for name, weight in weights.items() if weight < 0)
    if negative:
        raise ConfigError(f"the weight of the loss '{negative[0]}' is negative", where="distill.stages: losses")
    blended = {name: weight * LOSSES[name].factor(alpha, temperature) for name, weight in weights.items()}
    active = {name: weight for name, weight in blended.items() if weight > 0}
    if not active:
        why = f"with alpha {alpha:g} the losses {dict(weights)} all have the weight 0"
        raise ConfigError("a stage has no loss to train on", where="distill.stages: losses, distill.alpha", why=why)
    return active


def token_losses(
    hidden_TD: Tensor,
    head_VD: Tensor,
    labels_T: Tensor,
    signal: TeacherSignal | None,
    weights: Mapping[str, float],
    temperature: float,
) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum over tokens of the losses on logits, and each one's own sum (unweighted, nats).

    Args:
        hidden_TD: final hidden states of tokens that have a label.
        head_VD: the head's weight, cut to the true vocabulary.
        signal: the teacher on the same tokens; only read when "kl" is active.
        weights: from `active_weights`; losses on features are ignored here.
    """

    def chunk(logits_tV: Tensor, span: slice) -> dict[str, tuple[float, Tensor]]:
        parts: dict[str, tuple[float, Tensor]] = {}
        if "ce" in weights:
            parts["ce"] = (weights["ce"], cross_entropy(logits_tV, labels_T[span]).sum())
        if "kl" in weights and signal is not None:
            part = signal[span]
            kept = (part.indices_SK, part.logprobs_SK, part.tail_logmass_S)
            parts["kl"] = (weights["kl"], cached_kl(logits_tV, *kept, temperature).sum())
        return parts

    return head_loss(hidden_TD, head_VD, chunk)
