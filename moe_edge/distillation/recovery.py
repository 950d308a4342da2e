"""Runs the stages in sequence and resumes them: each one is a Trainer run in its own checkpoint folder.

A stage that has finished is recognised by the checkpoint of its last step; then only its weights and its log are read.

Shape suffixes: N rows, S tokens of a row.
"""

import copy
import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedModel, TrainerCallback

from moe_edge.contracts.config import DistillConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.callbacks import BalanceAdvice, ShowProgress, require_tensorboard, tensorboard_callback
from moe_edge.distillation.checkpoints import (
    SAVE_INTERVAL_S,
    SaveByTheClock,
    history_of,
    latest_checkpoint,
    load_weights,
    step_lines,
    step_of,
)
from moe_edge.distillation.losses import of_kind
from moe_edge.distillation.schedule import StageSchedule, full_rate, micro_rows, multipliers_of, rows_of_process
from moe_edge.distillation.signal import SignalSource
from moe_edge.distillation.stage_parts import (
    PartsBuilder,
    stage_blend,
    stage_weights,
    teacher_source,
    wants_live_logits,
)
from moe_edge.distillation.teacher import on_device
from moe_edge.distillation.terms import TermInputs
from moe_edge.distillation.trainer import DistillationTrainer, DistillationTrainingArguments, RowDataset
from moe_edge.models.students import use_fastest_experts
from moe_edge.models.taps import width

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageRecord:
    """One stage that was trained."""

    stage: str
    steps: int
    tokens: int
    teacher: Literal["live", "cached", "none"]  # where its logits came from
    log: list[dict[str, float]]  # a line per step
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class Recovery:
    """Everything the stages share.

    `signal`: the cached teacher; None where every stage asks the live one. `interval_s`: seconds between checkpoints.
    `inputs`: see `TermInputs`. `processes`: how many train together, this one being number `rank`; they see the same
    folder of checkpoints, in which only number 0 writes.
    """

    config: DistillConfig
    ids_NS: np.ndarray
    signal: SignalSource | None
    vocab: int
    teacher: Path
    checkpoints: Path
    interval_s: float = SAVE_INTERVAL_S
    inputs: TermInputs = TermInputs()
    rank: int = 0
    processes: int = 1

    def train(self, student: PreTrainedModel, schedules: Sequence[StageSchedule]) -> list[StageRecord]:
        """Train `student` in place through all stages; returns one record per stage with its log."""
        config = copy.deepcopy(student.config)  # the Trainer writes into it; what is saved must not depend on that
        if not torch.cuda.is_available():
            use_fastest_experts(student)
        student.train()
        records = []
        for index, schedule in enumerate(schedules):
            started = time.monotonic()
            history = self._stage(student, schedule, self.checkpoints / f"{index}-{schedule.name}")
            tokens = len(schedule.rows) * self.ids_NS.shape[1]
            seconds = round(time.monotonic() - started, 1)
            source = teacher_source(self.config, schedule.config)
            records.append(StageRecord(schedule.name, schedule.steps, tokens, source, history, seconds))
            gc.collect()
        student.requires_grad_(True)
        student.eval()  # type: ignore[no-untyped-call]
        student.config = config
        return records

    def check(self, student: PreTrainedModel, schedules: Sequence[StageSchedule]) -> None:
        """Refuse what cannot be before anything is trained.

        Raises:
            ConfigError: patterns without effect, losses that cancel out or lack the teacher.
            EnvironmentProblem: events are wanted and tensorboard is missing.
        """
        if self.config.tensorboard:
            require_tensorboard()
        names = [name for name, _ in student.named_parameters()]
        for schedule in schedules:
            multipliers_of(names, schedule.config.parameter_lr_multipliers)
            live = wants_live_logits(self.config, schedule.config)
            divergences = of_kind(stage_weights(self.config, schedule.config), "divergence")
            if divergences and not live and self.signal is None:
                why = "no teacher logits are cached for these rows"
                where = f"distill.stages: {schedule.name}"
                raise ConfigError(
                    "a stage has no teacher to learn from", where=where, why=why, next_command="teacher: live"
                )

    def _stage(self, student: PreTrainedModel, schedule: StageSchedule, folder: Path) -> list[dict[str, float]]:
        last = latest_checkpoint(folder)
        if last is not None and step_of(last) >= schedule.steps:
            log.info("distill: the stage '%s' is finished", schedule.name)
            load_weights(student, last)
            return history_of(last)
        if last is not None:
            log.info("distill: resuming '%s' behind step %d of %d", schedule.name, step_of(last), schedule.steps)
        resume = str(last) if last is not None else None
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            return self._sharded_stage(student, schedule, folder, resume)
        trainer = self.trainer(student, schedule, folder)
        trainer.train(resume_from_checkpoint=resume)
        return step_lines(trainer.state)

    def _sharded_stage(
        self, student: PreTrainedModel, schedule: StageSchedule, folder: Path, resume: str | None
    ) -> list[dict[str, float]]:
        """FSDP shards what it trains for good: a copy is trained, and `student` takes the whole weights of its last step."""
        device = next(student.parameters()).device
        learner = copy.deepcopy(student)
        on_device(student, torch.device("cpu"))
        trainer = self.trainer(learner, schedule, folder)
        if not trainer.is_fsdp_enabled:
            log.warning("distill: accelerate shards on accelerators only; every process has the whole weights")
        trainer.train(resume_from_checkpoint=resume)
        last = latest_checkpoint(folder)
        assert last is not None and step_of(last) == schedule.steps
        load_weights(student, last)
        on_device(student, device)
        return step_lines(trainer.state)

    def trainer(self, student: PreTrainedModel, schedule: StageSchedule, folder: Path) -> DistillationTrainer:
        """The Trainer of one stage."""
        builder = PartsBuilder(self.config, self.teacher, schedule.steps, self.vocab, self.inputs)
        parts, teacher = builder.build(student, schedule.config)
        return DistillationTrainer(
            model=student,
            args=training_arguments(
                self.config, schedule, folder, self.ids_NS.shape[1], width(student), self.processes
            ),
            train_dataset=RowDataset(self.ids_NS, schedule.rows),
            lr_multipliers=schedule.config.parameter_lr_multipliers,
            signal=self.signal,
            teacher=teacher,
            parts=parts,
            vocab=self.vocab,
            callbacks=self._callbacks(schedule),
        )

    def _callbacks(self, schedule: StageSchedule) -> list[TrainerCallback]:
        if self.rank > 0:
            return [SaveByTheClock(self.interval_s)]  # the leader says and writes the rest
        shown = ShowProgress(f"distill: {schedule.name}", schedule.steps)
        callbacks: list[TrainerCallback] = [SaveByTheClock(self.interval_s), shown, BalanceAdvice()]
        if self.config.tensorboard:
            callbacks.append(tensorboard_callback(self.checkpoints.parent / "tensorboard" / schedule.name))
        return callbacks


def training_arguments(
    config: DistillConfig, schedule: StageSchedule, folder: Path, row_tokens: int, hidden_size: int, processes: int = 1
) -> DistillationTrainingArguments:
    """The Trainer's settings of one stage: one pass over its rows, warm-up, cosine to zero.

    Several processes take the steps of one: each has its part of the rows of a step.
    """
    share = rows_of_process(config.batch_rows, processes)
    rows = micro_rows(share, row_tokens)
    cuda = torch.cuda.is_available()
    alpha, temperature = stage_blend(config, schedule.config)
    return DistillationTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=share // rows,
        num_train_epochs=1,
        learning_rate=full_rate(schedule.config, hidden_size),
        warmup_steps=schedule.warmup_steps,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        seed=config.seed,
        use_cpu=not cuda,
        ddp_find_unused_parameters=False,  # the loss is made outside of the wrapped forward pass; see `compute_loss`
        bf16=cuda if config.precision == "auto" else config.precision == "bfloat16",
        activation_checkpointing=config.gradient_checkpointing,
        distillation_alpha=alpha,
        distillation_temperature=temperature,
        loss_weights={name: float(weight) for name, weight in schedule.config.losses.items()},
        jsd_beta=config.jsd_beta,
        skew=config.skew,
    )
