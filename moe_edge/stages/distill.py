"""distill: the compressed student recovers by learning from its teacher; writes model/ and train_log.jsonl.

The student that leaves this stage is the better one on rows that were never trained on: if training did not lower the
held-out KL, the student of `compress` goes on unchanged and the summary says so. Seconds are in the summary only, so
that the stage's files depend on its inputs alone, however often it was killed and resumed. A student that the user brings is
trained by distill_pair.py. Several processes train together (`accelerate launch`); the leader measures, saves and writes.

Shape suffixes: N rows, S tokens of a row.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.plan import Plan
from moe_edge.distillation.alignment import layer_cka
from moe_edge.distillation.data import CAPTURED, rows_and_signal, term_material
from moe_edge.distillation.evaluation import held_out_kl
from moe_edge.distillation.memory import (
    no_room_for_training,
    no_room_for_weights,
    recipe_with_room,
    room_for_teacher,
    training_device,
)
from moe_edge.distillation.outcome import Judge, Measured, Record, require_shareable, train_between, write_outcome
from moe_edge.distillation.recovery import Recovery
from moe_edge.distillation.schedule import schedule_stages, split_rows
from moe_edge.distillation.signal import CachedSignal
from moe_edge.distillation.stage_parts import losses_on_tokens, require_temperatures
from moe_edge.distillation.tokenizer_pair import require_same_tokenizer
from moe_edge.models.loading import load_model, load_tokenizer, save_student, stored_dtype, true_vocabulary
from moe_edge.models.students import (
    TRAINABLE,
    is_shared_core,
    load_student,
    mirror_student,
    plain_form,
    save_trainable,
    trainable_folder,
)
from moe_edge.process.placement import fits_in_memory
from moe_edge.process.ranks import current_ranks
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.folders import written_beside
from moe_edge.storage.rows import TokenRows

log = logging.getLogger(__name__)


def run(context: StageContext) -> Record:
    """Train the student of `compress`, keep the better of before and after; returns what was gained, to the leader.

    Raises:
        ConfigError: stages, patterns, losses, temperature or data that cannot be; raised before the first step.
        InputRejected: the logit cache belongs to another teacher.
    """
    source = context.inputs["compress"] / "model"
    if reason := current_ranks().lead(lambda: _not_to_train(context, source)):
        return _unchanged(context, source, reason)
    require_shareable(context.config.distill)
    with rows_and_signal(context) as (rows, signal):
        return _distill(context, source, rows, signal)


def _not_to_train(context: StageContext, source: Path) -> str | None:
    config = context.config.distill
    if not config.stages:
        return "distill.stages is empty"
    if not Plan.read(context.inputs["plan"] / "plan.json").alters:
        return "the plan changes no expert, so there is nothing to recover"
    return no_room_for_weights(config, inspect_checkpoint(source), training_device())


def _unchanged(context: StageContext, source: Path, reason: str) -> Record:
    if not current_ranks().leads:
        return {}
    log.warning("distill: %s; the student goes on unchanged", reason)
    mirror_student(source.parent, context.out)
    write_outcome(context.out, [], {"trained": False, "reason": reason})
    return {"trained": False, "kept": "untrained", "reason": reason, "tokens_trained": 0}


def _distill(context: StageContext, source: Path, rows: TokenRows, signal: CachedSignal) -> Record:
    ids_NS, ranks = rows.ids_NS, current_ranks()
    headers = inspect_checkpoint(context.teacher)
    fits = ranks.share(fits_in_memory(headers, torch.float32, training_device(), ranks.local_world))
    config = recipe_with_room(context.config.distill, fits)
    train_rows, held_out_rows = split_rows(len(ids_NS))
    schedules = schedule_stages(config, train_rows, ids_NS.shape[1])
    _check_teacher(context, source, signal)
    student = load_student(trainable_folder(source.parent)).to(training_device())
    if reason := ranks.lead(lambda: no_room_for_training(config, student, schedules, training_device())):
        return _unchanged(context, source, reason)
    if not ranks.share(room_for_teacher(headers, student, schedules, training_device())):
        config = recipe_with_room(config, fits=False)
        schedules = schedule_stages(config, train_rows, ids_NS.shape[1])
    vocab = true_vocabulary(load_tokenizer(source), student.config.vocab_size)
    recovery = Recovery(
        config, ids_NS, signal, vocab, context.teacher, context.out / "checkpoints",
        material=term_material(context, student, rows), rank=ranks.rank, processes=ranks.world,
    )  # fmt: skip
    recovery.check(student, schedules)
    judge = _judge(context, ids_NS[held_out_rows], signal, vocab, fits)
    dtype = stored_dtype(inspect_checkpoint(source))
    outcome = train_between(judge, recovery, student, schedules, dtype)
    if not ranks.leads:
        return {}
    if outcome.better:
        student.to("cpu", dtype)
        if is_shared_core(student):
            save_trainable(student, source, context.out / TRAINABLE)
        with written_beside(context.out / "model") as folder:
            save_student(plain_form(student), source, folder)
    else:
        ends = outcome.after.nats, outcome.before.nats
        log.warning("distill: held-out KL %.4f is not below %.4f, the untrained student stays", *ends)
        mirror_student(source.parent, context.out)
    for scratch in ("checkpoints", CAPTURED):
        shutil.rmtree(context.out / scratch, ignore_errors=True)
    measure = f"{signal.description}, T = 1, nats per token"
    summary = outcome.summary(len(held_out_rows) * ids_NS.shape[1], measure)
    write_outcome(context.out, outcome.records, summary)
    return summary | outcome.seconds


def _check_teacher(context: StageContext, source: Path, signal: CachedSignal) -> None:
    """Refuse, before a model is loaded, a teacher that cannot say what the stages ask."""
    require_temperatures(context.config.distill, signal)
    losses = losses_on_tokens(context.config.distill)
    require_same_tokenizer(load_tokenizer(source), load_tokenizer(context.teacher), losses)


def _judge(context: StageContext, ids_NS: Any, signal: CachedSignal, vocab: int, fits: bool) -> Judge:
    """A function from a student to its `Measured`; CKA only where the teacher fits beside the student."""

    def judge(student: nn.Module) -> Measured:
        kl_nats = held_out_kl(student, ids_NS, signal, vocab)
        if not fits:
            return Measured(kl_nats, None)
        teacher = load_model(context.teacher).to(next(student.parameters()).device)
        return Measured(kl_nats, layer_cka(student, teacher, ids_NS))

    return judge
