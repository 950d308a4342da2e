"""What every distillation has in common: the student measured before and after its training, the better one kept, and
what is written about it. Seconds stay out of the files, so that these depend on their inputs alone.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from moe_edge.contracts.config import DistillConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.recovery import Recovery
from moe_edge.distillation.schedule import StageSchedule, rows_of_process
from moe_edge.process.ranks import current_ranks
from moe_edge.storage.files import write_json_atomic, write_text_atomic

Record = dict[str, Any]
NO_ROOM = "not measured: the teacher does not fit in memory beside the student"


@dataclass(frozen=True)
class Measured:
    """A student on the held-out rows."""

    nats: float
    cka_by_layer: list[float] | None
    name: str = "kl_nats"

    def to_dict(self) -> Record:
        mean = None if self.cka_by_layer is None else sum(self.cka_by_layer) / len(self.cka_by_layer)
        return {self.name: self.nats, "cka_mean": mean, "cka_by_layer": self.cka_by_layer}


Judge = Callable[[nn.Module], Measured]


@dataclass(frozen=True)
class Outcome:
    """One training: a record per stage, and the student at both ends."""

    records: list[Record]
    before: Measured
    after: Measured

    @property
    def better(self) -> bool:
        return math.isfinite(self.after.nats) and self.after.nats < self.before.nats

    def summary(self, held_out_tokens: int, measure: str, no_cka: str = NO_ROOM) -> Record:
        """metrics.json.

        Args:
            measure: in words, what was measured on the held-out tokens.
            no_cka: why there is no CKA, where there is none.
        """
        reason = "held-out KL fell" if self.better else "held-out KL did not fall"
        return {
            "trained": True,
            "kept": "trained" if self.better else "untrained",
            "reason": f"{reason}: {self.before.nats:.4f} -> {self.after.nats:.4f} nats",
            "tokens_trained": sum(record["tokens"] for record in self.records),
            "held_out_tokens": held_out_tokens,
            "held_out_kl": measure,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "cka": "debiased linear CKA of layer outputs, teacher to student, held-out rows"
            if self.before.cka_by_layer is not None
            else no_cka,
            "stages": [_stage_summary(record) for record in self.records],
        }

    @property
    def seconds(self) -> Record:
        return {"seconds_per_stage": {record["stage"]: record["seconds"] for record in self.records}}


def train_between(
    judge: Judge, recovery: Recovery, student: nn.Module, schedules: Sequence[StageSchedule], dtype: torch.dtype
) -> Outcome:
    """Measure, train in place, round to what will be saved, measure again. Of several processes the leader measures."""
    ranks = current_ranks()
    before = ranks.lead(partial(judge, student))
    records = recovery.train(student, schedules)
    round_to(student, dtype)
    return Outcome(records, before, ranks.lead(partial(judge, student)))


def require_shareable(config: DistillConfig) -> None:
    """Refuse, before anything is read, processes that cannot train together.

    Raises:
        ConfigError: they cannot have equal shares of a step's rows, or two of them would have the same accelerator.
    """
    ranks, found = current_ranks(), torch.cuda.device_count()
    rows_of_process(config.batch_rows, ranks.world)
    if ranks.world > 1 and ranks.local_world > found and torch.cuda.is_available():
        why = f"{ranks.local_world} processes, accelerators found: {found}"
        raise ConfigError(
            "each process needs an accelerator of its own", why=why, next_command=f"--num_processes {found}"
        )


@torch.no_grad()
def round_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to `dtype`'s grid in place: what is measured is what will be saved."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _stage_summary(record: Record) -> Record:
    """Losses as means over the first and the last tenth of the steps: a step may be one row, and rows differ."""
    log, names = record["log"], ("stage", "steps", "tokens", "teacher")
    tenth = max(1, len(log) // 10)
    losses = dict.fromkeys(name for step in log for name in step if name.endswith("_loss"))
    ends = {name: [_mean(name, log[:tenth]), _mean(name, log[-tenth:])] for name in losses}
    return {name: record[name] for name in names} | {"first_and_last": ends}


def _mean(loss: str, steps: list[Record]) -> float | None:
    """None where no step has it: rows that the student wrote have no cross-entropy."""
    found = [step[loss] for step in steps if loss in step]
    return mean(found) if found else None


def write_outcome(out: Path, records: list[Record], summary: Record) -> None:
    """train_log.jsonl (one line per step) and metrics.json, free of clocks."""
    steps = [{"stage": record["stage"], **entry} for record in records for entry in record["log"]]
    timeless = [{name: value for name, value in step.items() if not name.endswith("_seconds")} for step in steps]
    lines = [json.dumps(step, sort_keys=True) + "\n" for step in timeless]
    write_text_atomic(out / "train_log.jsonl", "".join(lines))
    write_json_atomic(out / "metrics.json", summary)
