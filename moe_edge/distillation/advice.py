"""What the log of a training stage says to whoever set it up: are the parts of the blend out of balance, does it learn?

The rule of thumb is that of the usual recipe for distillation: where the cross-entropy is far above the divergence, alpha
may rise; where the divergence is far above it, alpha may fall. Nothing is changed on its own.
"""

import logging
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_edge.distillation.checkpoints import step_lines

log = logging.getLogger(__name__)
FAR = 10.0  # times the other part


def balance_advice(history: Sequence[Mapping[str, Any]]) -> str | None:
    """One sentence, or None where nothing is out of balance.

    Args:
        history: the log of the steps, with ce_loss and kl_loss in nats; its last quarter decides.
    """
    tail = [entry for entry in history[-max(1, len(history) // 4) :] if {"ce_loss", "kl_loss"} <= entry.keys()]
    if not tail:
        return None
    ce, kl = (fmean(entry[name] for entry in tail) for name in ("ce_loss", "kl_loss"))
    if ce > FAR * kl:
        return (
            f"ce_loss {ce:.3f} is far above kl_loss {kl:.3f}: a larger distill.alpha follows the teacher more closely"
        )
    if kl > FAR * ce:
        return f"kl_loss {kl:.3f} is far above ce_loss {ce:.3f}: a smaller distill.alpha, or a longer stage, may help"
    return None


class BalanceAdvice(TrainerCallback):
    """Logs the advice at the end of a stage."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        advice = balance_advice(step_lines(state))
        if advice is not None:
            log.info("distill: %s", advice)
