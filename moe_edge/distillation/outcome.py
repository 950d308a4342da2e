"""What a training won: the student on held-out rows before and after it, which of both goes on, and what is written about it.

Seconds are in the summary only, so that the files depend on their inputs alone, however often a training was killed and
resumed.

Shape suffixes: N rows, S tokens of a row, D model.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_edge.contracts.artifacts import DistillSummary, HeldOut, TrainedStage
from moe_edge.distillation.losses import TokenLosses
from moe_edge.distillation.recovery import StageRecord
from moe_edge.distillation.signal import SignalSource
from moe_edge.distillation.teacher import head_weight
from moe_edge.models.taps import body
from moe_edge.process.progress import track
from moe_edge.storage.files import write_json_atomic, write_text_atomic

CKA = "debiased linear CKA of layer outputs, teacher to student, held-out rows"


@torch.no_grad()
def held_out_kl(student: nn.Module, ids_NS: np.ndarray, signal: SignalSource, vocab: int) -> float:
    """Mean KL(teacher || student) at T = 1 in nats per token over all positions of the rows.

    Of the cached teacher: its top-k and one tail bucket, a lower bound of the full KL.
    """
    total, device, losses = 0.0, next(student.parameters()).device, TokenLosses({"kl": 1.0}, temperature=1.0)
    for ids_S in track(ids_NS, "distill: held-out KL"):
        ids_S = torch.from_numpy(ids_S).long().to(device)
        hidden_SD = body(student)(input_ids=ids_S[None], use_cache=False).last_hidden_state[0]
        loss, _ = losses(hidden_SD, head_weight(student, vocab), None, [signal.signal(ids_S, 1.0)])
        total += float(loss)
    return total / ids_NS.size


def distance_nats(held_out: HeldOut) -> float:
    """The number by which students are compared, whichever was measured."""
    nats = held_out.projected_kl_nats if held_out.kl_nats is None else held_out.kl_nats
    assert nats is not None
    return nats


@dataclass(frozen=True)
class Outcome:
    """One training: a record per stage, and the student at both ends."""

    records: list[StageRecord]
    before: HeldOut
    after: HeldOut

    @property
    def nats(self) -> tuple[float, float]:
        """Before and after."""
        return distance_nats(self.before), distance_nats(self.after)

    @property
    def better(self) -> bool:
        before, after = self.nats
        return math.isfinite(after) and after < before

    def summary(self, held_out_tokens: int, measure: str, no_cka: str) -> DistillSummary:
        """
        Args:
            measure: in words, what was measured on the held-out tokens.
            no_cka: why there is no CKA, where there is none.
        """
        reason = "held-out KL fell" if self.better else "held-out KL did not fall"
        before, after = self.nats
        return DistillSummary(
            trained=True,
            kept="trained" if self.better else "untrained",
            reason=f"{reason}: {before:.4f} -> {after:.4f} nats",
            tokens_trained=sum(record.tokens for record in self.records),
            held_out_tokens=held_out_tokens,
            held_out_kl=measure,
            before=self.before,
            after=self.after,
            cka=no_cka if self.before.cka_by_layer is None else CKA,
            stages=[_trained_stage(record) for record in self.records],
            seconds_per_stage={record.stage: record.seconds for record in self.records},
        )


def _trained_stage(record: StageRecord) -> TrainedStage:
    """Losses as means over the first and the last tenth of the steps: a step may be one row, and rows differ."""
    log, tenth = record.log, max(1, len(record.log) // 10)
    losses = dict.fromkeys(name for step in log for name in step if name.endswith("_loss"))
    ends = {name: (_mean(name, log[:tenth]), _mean(name, log[-tenth:])) for name in losses}
    return TrainedStage(
        stage=record.stage, steps=record.steps, tokens=record.tokens, teacher=record.teacher, first_and_last=ends
    )


def _mean(loss: str, steps: list[dict[str, float]]) -> float | None:
    """None where no step has it: rows that the student wrote have no cross-entropy."""
    found = [step[loss] for step in steps if loss in step]
    return mean(found) if found else None


def write_outcome(out: Path, records: list[StageRecord], summary: DistillSummary) -> None:
    """train_log.jsonl (one line per step) and metrics.json, free of clocks."""
    steps = [{"stage": record.stage, **line} for record in records for line in record.log]
    timeless = [{name: value for name, value in step.items() if not name.endswith("_seconds")} for step in steps]
    lines = [json.dumps(step, sort_keys=True) + "\n" for step in timeless]
    write_text_atomic(out / "train_log.jsonl", "".join(lines))
    write_json_atomic(out / "metrics.json", _metrics(summary))


def _metrics(summary: DistillSummary) -> dict[str, Any]:
    """The summary without seconds, and without what does not apply."""
    if not summary.trained:
        return summary.model_dump(include={"trained", "reason"})
    metrics = summary.model_dump(exclude={"seconds_per_stage"})
    for end in ("before", "after"):
        for distance in ("kl_nats", "projected_kl_nats"):
            if metrics[end][distance] is None:
                del metrics[end][distance]
    return metrics
