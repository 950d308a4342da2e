"""distill: the compressed student recovers by learning from its teacher; writes model/ and train_log.jsonl.

The student that leaves this stage is the better one on rows that were never trained on: if training did not lower the
held-out KL, the student of `compress` goes on unchanged and the summary says so. Seconds are in the summary only, so
that the stage's files depend on its inputs alone, however often it was killed and resumed.

Shape suffixes: N rows, S tokens of a row.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.plan import Plan
from moe_edge.distillation.alignment import layer_cka
from moe_edge.distillation.cross_tokenizer import compares_tokens
from moe_edge.distillation.evaluation import held_out_kl
from moe_edge.distillation.recovery import Recovery
from moe_edge.distillation.schedule import schedule_stages, split_rows
from moe_edge.distillation.signal import CachedSignal
from moe_edge.distillation.stage_parts import stage_blend, stage_weights, wants_live_logits
from moe_edge.distillation.tokenizer_pair import require_same_tokenizer
from moe_edge.families.loading import load_model, load_tokenizer, save_student, stored_dtype
from moe_edge.families.streaming import fits_in_memory
from moe_edge.families.students import (
    TRAINABLE,
    is_shared_core,
    load_student,
    mirror_student,
    plain_form,
    save_trainable,
    trainable_folder,
)
from moe_edge.stages.distill_data import CAPTURED, rows_and_signal, term_material
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.files import write_json_atomic, write_text_atomic
from moe_edge.storage.folders import written_beside
from moe_edge.storage.rows import TokenRows

log = logging.getLogger(__name__)
Record = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A student on the held-out rows."""

    kl_nats: float
    cka_by_layer: list[float] | None

    def to_dict(self) -> Record:
        mean = None if self.cka_by_layer is None else sum(self.cka_by_layer) / len(self.cka_by_layer)
        return {"kl_nats": self.kl_nats, "cka_mean": mean, "cka_by_layer": self.cka_by_layer}


def run(context: StageContext) -> Record:
    """Train the student of `compress`, keep the better of before and after; returns what was gained.

    Raises:
        ConfigError: stages, patterns, losses, temperature or data that cannot be; raised before the first step.
        InputRejected: the logit cache belongs to another teacher.
    """
    source = context.inputs["compress"] / "model"
    if reason := _nothing_to_do(context):
        log.info("distill: %s, the student goes on unchanged", reason)
        mirror_student(source.parent, context.out)
        _write(context.out, [], {"trained": False, "reason": reason})
        return {"trained": False, "kept": "untrained", "reason": reason, "tokens_trained": 0}
    with rows_and_signal(context) as (rows, signal):
        return _distill(context, source, rows, signal)


def _nothing_to_do(context: StageContext) -> str | None:
    if not context.config.distill.stages:
        return "distill.stages is empty"
    if not Plan.read(context.inputs["plan"] / "plan.json").alters:
        return "the plan changes no expert, so there is nothing to recover"
    return None


def _distill(context: StageContext, source: Path, rows: TokenRows, signal: CachedSignal) -> Record:
    config, ids_NS = context.config.distill, rows.ids_NS
    train_rows, held_out_rows = split_rows(len(ids_NS))
    schedules = schedule_stages(config, train_rows, ids_NS.shape[1])
    _check_teacher(context, source, signal)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = load_student(trainable_folder(source.parent)).to(device)
    recovery = Recovery(
        config, ids_NS, signal, student.config.vocab_size, context.teacher, context.out / "checkpoints",
        material=term_material(context, student, rows),
    )  # fmt: skip
    recovery.check(student, schedules)
    judge = _judge(context, ids_NS[held_out_rows], signal)
    before = judge(student)
    records = recovery.train(student, schedules)
    dtype = stored_dtype(inspect_checkpoint(source))
    round_to(student, dtype)
    after = judge(student)
    better = math.isfinite(after.kl_nats) and after.kl_nats < before.kl_nats
    if better:
        student.to("cpu", dtype)
        if is_shared_core(student):
            save_trainable(student, source, context.out / TRAINABLE)
        with written_beside(context.out / "model") as folder:
            save_student(plain_form(student), source, folder)
    else:
        log.warning(
            "distill: held-out KL %.4f is not below %.4f, the untrained student stays", after.kl_nats, before.kl_nats
        )
        mirror_student(source.parent, context.out)
    for scratch in ("checkpoints", CAPTURED):
        shutil.rmtree(context.out / scratch, ignore_errors=True)
    summary = _summary(records, before, after, better, len(held_out_rows) * ids_NS.shape[1], signal.description)
    _write(context.out, records, summary)
    return summary | {"seconds_per_stage": {record["stage"]: record["seconds"] for record in records}}


def _check_teacher(context: StageContext, source: Path, signal: CachedSignal) -> None:
    """Refuse, before a model is loaded, a teacher that cannot say what the stages ask."""
    config, losses = context.config.distill, set()
    signal.require(1.0)  # of the held-out KL
    for stage in config.stages:
        if not wants_live_logits(config, stage):
            signal.require(stage_blend(config, stage)[1])
        losses |= {name for name in stage_weights(config, stage) if compares_tokens(name)}
    require_same_tokenizer(load_tokenizer(source), load_tokenizer(context.teacher), losses)


def _judge(context: StageContext, ids_NS: Any, signal: CachedSignal) -> Callable[[nn.Module], Measured]:
    """A function from a student to its `Measured`; CKA only where the teacher fits beside the student."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fits = fits_in_memory(inspect_checkpoint(context.teacher), torch.float32, device)

    def judge(student: nn.Module) -> Measured:
        kl_nats = held_out_kl(student, ids_NS, signal, student.config.vocab_size)
        if not fits:
            return Measured(kl_nats, None)
        teacher = load_model(context.teacher).to(next(student.parameters()).device)
        return Measured(kl_nats, layer_cka(student, teacher, ids_NS))

    return judge


@torch.no_grad()
def round_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to `dtype`'s grid in place: what is measured is what will be saved."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _summary(
    records: list[Record], before: Measured, after: Measured, better: bool, held_out_tokens: int, held_out_kl: str
) -> Record:
    reason = "held-out KL fell" if better else "held-out KL did not fall"
    return {
        "trained": True,
        "kept": "trained" if better else "untrained",
        "reason": f"{reason}: {before.kl_nats:.4f} -> {after.kl_nats:.4f} nats",
        "tokens_trained": sum(record["tokens"] for record in records),
        "held_out_tokens": held_out_tokens,
        "held_out_kl": f"{held_out_kl}, T = 1, nats per token",
        "before": before.to_dict(),
        "after": after.to_dict(),
        "cka": "debiased linear CKA of layer outputs, teacher to student, held-out rows"
        if before.cka_by_layer is not None
        else "not measured: the teacher does not fit in memory beside the student",
        "stages": [_stage_summary(record) for record in records],
    }


def _stage_summary(record: Record) -> Record:
    first, last = record["log"][0], record["log"][-1]
    losses = {name: [first[name], last[name]] for name in first if name.endswith("_loss")}
    return {name: record[name] for name in ("stage", "steps", "tokens")} | {"first_and_last": losses}


def _write(out: Path, records: list[Record], summary: Record) -> None:
    """train_log.jsonl (one line per step) and metrics.json, free of clocks."""
    steps = [{"stage": record["stage"], **entry} for record in records for entry in record["log"]]
    timeless = [{name: value for name, value in step.items() if not name.endswith("_seconds")} for step in steps]
    lines = [json.dumps(step, sort_keys=True) + "\n" for step in timeless]
    write_text_atomic(out / "train_log.jsonl", "".join(lines))
    write_json_atomic(out / "metrics.json", summary)
