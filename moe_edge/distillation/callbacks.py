"""What a training stage tells on the way: a progress bar and a line per step, events for TensorBoard, and advice at its end.

The rule of thumb behind the advice is that of the usual recipe for distillation: where the cross-entropy is far above the
divergence, alpha may rise; where the divergence is far above it, alpha may fall. Nothing is changed on its own.
"""

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_edge.contracts.errors import EnvironmentProblem
from moe_edge.distillation.checkpoints import step_lines
from moe_edge.process.progress import track

log = logging.getLogger(__name__)
FAR = 10.0  # times the other part
HEALTH = (
    "router_entropy",
    "router_dead_experts",
    "router_drift_nats",
    "ka_sampled",
    "ka_lambda",
    "sar_drift_nats",
)  # shown beside the losses


class ShowProgress(TrainerCallback):
    """The product's own progress bar and one log line per step, in place of the Trainer's."""

    def __init__(self, label: str, steps: int) -> None:
        self._bar = track(range(steps), label, total=steps)
        self._shown = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        while self._shown < state.global_step:
            next(self._bar, None)
            self._shown += 1

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for _ in self._bar:
            pass

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "total_loss" in logs:  # not the summary at the end
            losses = [name for name in logs if name.endswith("_loss") and name != "total_loss"]
            shown = {name: logs[name] for name in ("total_loss", *losses, *HEALTH) if name in logs}
            text = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
            log.info("step %d/%d: %s", state.global_step, state.max_steps, text)


def require_tensorboard() -> None:
    """Raises EnvironmentProblem where the package is missing."""
    if find_spec("tensorboard") is None:
        raise EnvironmentProblem(
            "TensorBoard events were asked for, and tensorboard is not installed",
            where="distill.tensorboard",
            next_command="pip install 'moe-edge[tensorboard]'",
        )


def tensorboard_callback(folder: Path) -> TrainerCallback:
    """Writes what the Trainer logs as events below `folder`; raises as `require_tensorboard`."""
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    writer = SummaryWriter(str(folder))
    callback: TrainerCallback = TensorBoardCallback(writer)  # type: ignore[no-untyped-call]
    return callback


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
