"""One distillation from its rows to the better student: what a build's student and a user's own have in common.

The memory policy settles what is trained. The student is measured on held-out rows, trained in all stages, rounded to what
will be saved and measured again; the better of both ends is saved, and metrics.json and train_log.jsonl say what was won.
Several processes train together (`accelerate launch`); the leader decides, measures, saves and writes.

Shape suffixes: N rows, S tokens of a row.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_edge.contracts.artifacts import DistillSummary, HeldOut
from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.config import DistillConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.plan import KeptExperts
from moe_edge.contracts.row_split import RowSplit
from moe_edge.distillation.alignment import layer_cka, resolve_layer_map
from moe_edge.distillation.cross_tokenizer import CrossTokenizerTerm, held_out_distance
from moe_edge.distillation.data import CAPTURED, term_inputs
from moe_edge.distillation.memory import MemoryPolicy
from moe_edge.distillation.outcome import Outcome, held_out_kl, write_outcome
from moe_edge.distillation.recovery import Recovery
from moe_edge.distillation.schedule import recipe_of, rows_of_process, schedule_stages
from moe_edge.distillation.signal import CachedSignal
from moe_edge.distillation.stage_parts import losses_on_tokens, require_temperatures
from moe_edge.distillation.teacher import on_device
from moe_edge.distillation.tokenizer_pair import require_same_tokenizer
from moe_edge.models.loading import stored_dtype, true_vocabulary
from moe_edge.process.placement import settled, to_run
from moe_edge.process.ranks import current_ranks
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.rows import TokenRows

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"  # in the stage's folder, dropped at the end
ACROSS = "projected_kl: KL where both tokenizations meet, T = 1, nats, mean over rows"
OTHER_TOKENS = "not measured: the tokenizers differ, so that no two positions belong together"
NO_ROOM = "not measured: the teacher does not fit in memory beside the student"


@dataclass(frozen=True)
class Distillation:
    """Who learns from whom, on what, and everything in which one distillation differs from another."""

    memory: MemoryPolicy  # knows the stages that are wanted, and the stage's folder
    teacher: Teacher
    student: Path  # the plain checkpoint whose tokenizer and dtype the trained student keeps
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]  # the student's, the teacher's
    rows: TokenRows  # in the student's tokens
    signal: CachedSignal | None  # the teacher's cached word on them; None: it reads other tokens
    kept: KeptExperts | None  # the teacher's experts that the student kept, where it has some of them
    load: Callable[[], PreTrainedModel]  # the student, as it is trained
    load_teacher: Callable[[], nn.Module]  # on the student's device, to measure
    save: Callable[[PreTrainedModel, torch.dtype, bool], None]  # (trained student, dtype to save, is it the better one)


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


def distilled(work: Distillation) -> DistillSummary | str | None:
    """Train the student and save the better of before and after.

    Returns:
        What was won; a text: why there is no memory to train, where that may be; None in processes that only help.

    Raises:
        ConfigError: stages, patterns, losses or temperatures that cannot be; raised before the first step.
        InputRejected: the tokenizers differ and a loss compares token by token.
        ResourceProblem: no memory for stages of the user's own, or less than when an interrupted run of this began.
    """
    ranks, memory, headers = current_ranks(), work.memory, work.teacher.headers
    placement = settled(memory.out, lambda: to_run(headers, "float32", "auto", ranks), ranks)
    stages = ranks.lead(lambda: memory.stages(placement.whole))
    config = memory.config.model_copy(update={"stages": stages})
    split = RowSplit(*work.rows.ids_NS.shape)
    schedule_stages(config, split.train(), split.row_tokens)  # what cannot be is refused before the student is loaded
    _require_answers(work, config)
    dtype = stored_dtype(inspect_checkpoint(work.student))
    student = on_device(work.load(), torch.device(placement.device))
    if shortage := ranks.lead(lambda: memory.no_room_for_training(student, stages)):
        return shortage
    config = config.model_copy(update={"stages": ranks.lead(lambda: memory.settled(stages, student, headers))})
    outcome = _trained(work, config, split, student, dtype, placement.whole)
    return _finished(work, student, outcome, split, dtype) if ranks.leads else None


def _require_answers(work: Distillation, config: DistillConfig) -> None:
    """Refuse a teacher that cannot say what the stages ask."""
    if work.signal is not None:
        require_temperatures(config, work.signal)
    require_same_tokenizer(*work.tokenizers, losses_on_tokens(config))


def _trained(
    work: Distillation,
    config: DistillConfig,
    split: RowSplit,
    student: PreTrainedModel,
    dtype: torch.dtype,
    with_teacher: bool,
) -> Outcome:
    """Measure, train in place, round to `dtype`, in which it will be saved, measure again."""
    ranks, out, rows = current_ranks(), work.memory.out, work.rows
    vocab = true_vocabulary(work.tokenizers[0], student.config.vocab_size)
    schedules = schedule_stages(config, split.train(), split.row_tokens)
    inputs = term_inputs(recipe_of(config), work.teacher.path, student, rows, work.tokenizers, work.kept, out)
    recovery = Recovery(
        config,
        rows.ids_NS,
        work.signal,
        vocab,
        work.teacher.path,
        out / CHECKPOINTS,
        inputs=inputs,
        rank=ranks.rank,
        processes=ranks.world,
    )
    recovery.check(student, schedules)
    measure = partial(_measured, work, student, rows.ids_NS[list(split.held_out())], vocab, with_teacher)
    before = ranks.lead(measure)
    records = recovery.train(student, schedules)
    round_to(student, dtype)
    return Outcome(records, before, ranks.lead(measure))


def _measured(
    work: Distillation, student: PreTrainedModel, ids_NS: np.ndarray, vocab: int, with_teacher: bool
) -> HeldOut:
    """The student on held-out rows; the teacher is in memory only while it is asked.

    Args:
        vocab: true vocabulary.
        with_teacher: does the teacher fit beside the student, for CKA? Across tokenizers it must.
    """
    if work.signal is None:
        term = CrossTokenizerTerm(student, work.load_teacher(), *work.tokenizers)
        return HeldOut(projected_kl_nats=held_out_distance(term, student, torch.from_numpy(ids_NS)))
    kl_nats = held_out_kl(student, ids_NS, work.signal, vocab)
    if not with_teacher:
        return HeldOut(kl_nats=kl_nats)
    teacher = work.load_teacher()
    by_layer = layer_cka(student, teacher, ids_NS, resolve_layer_map("proportional", student, teacher))
    return HeldOut(kl_nats=kl_nats, cka_mean=sum(by_layer) / len(by_layer), cka_by_layer=by_layer)


@torch.no_grad()
def round_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to `dtype`'s grid in place: what is measured is what will be saved."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _finished(
    work: Distillation, student: PreTrainedModel, outcome: Outcome, split: RowSplit, dtype: torch.dtype
) -> DistillSummary:
    """The leader's last work: save the better student, drop what was needed to resume, write what was won."""
    out = work.memory.out
    if not outcome.better:
        before, after = outcome.nats
        log.warning("distill: held-out KL %.4f is not below %.4f, the student stays as it was", after, before)
    work.save(student, dtype, outcome.better)
    for scratch in (CHECKPOINTS, CAPTURED):
        shutil.rmtree(out / scratch, ignore_errors=True)
    measured, no_cka = ACROSS, OTHER_TOKENS
    if work.signal is not None:
        measured, no_cka = f"{work.signal.description}, T = 1, nats per token", NO_ROOM
    summary = outcome.summary(len(split.held_out()) * split.row_tokens, measured, no_cka)
    write_outcome(out, outcome.records, summary)
    return summary
