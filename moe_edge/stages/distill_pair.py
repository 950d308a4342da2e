"""`moe-edge distill TEACHER --student MODEL`: a student that the user brings learns from a mixture, whatever it is itself.

Dense or a mixture, of another depth or width, with the teacher's tokenizer or another one. With the same tokenizer every
loss of the recipe is at hand and the held-out measure is the KL to the teacher; with another one only the losses that
bridge tokenizers (and those on the student alone), and the measure is `projected_kl`. No profile, no plan: nothing is
pruned. What comes out is a checkpoint folder for `moe-edge export`.

Shape suffixes: N rows, S tokens of a row.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.config import BuildConfig, DistillConfig, Loss, StageConfig
from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.distillation.alignment import layer_cka
from moe_edge.distillation.cross_tokenizer import CrossTokenizerTerm, held_out_distance
from moe_edge.distillation.data import CAPTURED, captured_text, is_capture, measured_material, wanted_rows
from moe_edge.distillation.evaluation import held_out_kl
from moe_edge.distillation.memory import (
    no_room_for_training,
    no_room_for_weights,
    recipe_with_room,
    room_for_teacher,
    training_device,
)
from moe_edge.distillation.outcome import (
    NO_ROOM,
    Judge,
    Measured,
    Outcome,
    Record,
    require_shareable,
    train_between,
    write_outcome,
)
from moe_edge.distillation.recovery import Recovery
from moe_edge.distillation.schedule import schedule_stages, split_rows
from moe_edge.distillation.signal import CachedSignal
from moe_edge.distillation.stage_parts import losses_on_tokens, require_temperatures
from moe_edge.distillation.teacher import teacher_model
from moe_edge.distillation.terms import unfit
from moe_edge.distillation.tokenizer_pair import require_same_tokenizer, tokenizer_differences
from moe_edge.formulas.matching import proportional_map
from moe_edge.models.loading import load_tokenizer, save_student, stored_dtype, true_vocabulary
from moe_edge.models.students import is_shared_core, load_student
from moe_edge.models.taps import decoder_layers, head
from moe_edge.process.placement import fits_in_memory
from moe_edge.process.ranks import current_ranks
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.folders import written_beside
from moe_edge.storage.rows import TokenRows

log = logging.getLogger(__name__)
SAME: dict[Loss, float] = {"ce": 1.0, "kl": 1.0, "cka": 0.5}
ACROSS: dict[Loss, float] = {"ce": 1.0, "projected_kl": 1.0}
ACROSS_MEASURE = "projected_kl: KL where both tokenizations meet, T = 1, nats, mean over rows"
OTHER_TOKENS = "not measured: the tokenizers differ, so that no two positions belong together"


@dataclass(frozen=True)
class Pair:
    """Who learns from whom. `tokenizers`: the student's, the teacher's."""

    student: Path
    teacher: Path
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]
    same_tokens: bool


def run(context: StageContext, student: Path) -> Record:
    """Train `student` on the teacher's word, keep the better of before and after; returns what was gained, to the leader.

    Raises:
        ConfigError: no stages, or stages, patterns, losses or data that cannot be; raised before the first step.
        InputRejected: the tokenizers differ and a loss compares token by token; or the student has shared cores.
    """
    tokenizers = load_tokenizer(student), load_tokenizer(context.teacher)
    pair = Pair(student, context.teacher, tokenizers, not tokenizer_differences(*tokenizers))
    context = replace(context, config=_recipe(context.config, pair))
    require_same_tokenizer(*tokenizers, losses_on_tokens(context.config.distill))
    require_shareable(context.config.distill)
    with _rows_and_signal(context, pair) as (rows, signal):
        return _distill(context, pair, rows, signal)


def _recipe(config: BuildConfig, pair: Pair) -> BuildConfig:
    """The user's stages, or one that every pair can have; raises ConfigError for what no pair can."""
    distill = config.distill
    if "stages" not in distill.model_fields_set:
        kind = SAME if pair.same_tokens else ACROSS
        log.info("distill: no stages are given; one with %s", ", ".join(f"{name} {kind[name]:g}" for name in kind))
        stage = StageConfig(stage_name="all", share=1.0, losses=kind, layer_map="proportional", teacher="live")
        fields = set(distill.model_fields_set)
        if not pair.same_tokens:
            fields.add("stages")  # as if the user's own: there is no cache that could do with less
        chosen = DistillConfig.model_construct(fields, **(dict(distill) | {"stages": [stage]}))
        return config.model_copy(update={"distill": chosen})
    if not distill.stages:
        raise ConfigError("there is nothing to train", where="distill.stages", why="the list is empty")
    if any(stage.losses.get("routing_kl") for stage in distill.stages):
        raise unfit("routing_kl", "a student whose experts are some of the teacher's", "its experts are its own")
    return config


@contextmanager
def _rows_and_signal(context: StageContext, pair: Pair) -> Iterator[tuple[TokenRows, CachedSignal | None]]:
    """Rows in the student's tokens, and the teacher's cached word where it reads the same ones."""
    if pair.same_tokens:
        rows, signal = captured_text(context)
        require_temperatures(context.config.distill, signal)
        try:
            yield rows, signal
        finally:
            signal.close()
        return
    data = context.config.distill.data
    if is_capture(Path(data).expanduser()):
        why = "a capture holds the teacher's tokens, and the student has others"
        raise ConfigError("a capture cannot teach this student", where=f"distill.data: {data}", why=why)
    yield wanted_rows(context, pair.student), None


def _distill(context: StageContext, pair: Pair, rows: TokenRows, signal: CachedSignal | None) -> Record:
    ids_NS, ranks = rows.ids_NS, current_ranks()
    headers = inspect_checkpoint(pair.teacher)
    fits = ranks.share(fits_in_memory(headers, torch.float32, training_device(), ranks.local_world))
    config = recipe_with_room(context.config.distill, fits)
    ranks.lead(lambda: no_room_for_weights(config, inspect_checkpoint(pair.student), training_device()))
    train_rows, held_out_rows = split_rows(len(ids_NS))
    schedules = schedule_stages(config, train_rows, ids_NS.shape[1])
    model = load_student(pair.student).to(training_device())
    if is_shared_core(model):
        why = "its trainable form belongs to the build that made it"
        raise InputRejected("a student with shared cores is trained by its build", where=str(pair.student), why=why)
    ranks.lead(lambda: no_room_for_training(config, model, schedules, training_device()))
    if not ranks.share(room_for_teacher(headers, model, schedules, training_device())):
        config = recipe_with_room(config, fits=False)
        schedules = schedule_stages(config, train_rows, ids_NS.shape[1])
    material = {"tokenizers": pair.tokenizers} | measured_material(context, model, rows)
    vocab = true_vocabulary(pair.tokenizers[0], head(model).weight.shape[0])
    recovery = Recovery(
        config, ids_NS, signal, vocab, pair.teacher, context.out / "checkpoints",
        material=material, rank=ranks.rank, processes=ranks.world,
    )  # fmt: skip
    recovery.check(model, schedules)
    judge = _judge(pair, ids_NS[held_out_rows], signal, vocab, fits)
    dtype = stored_dtype(inspect_checkpoint(pair.student))
    outcome = train_between(judge, recovery, model, schedules, dtype)
    if not ranks.leads:
        return {}
    _save(context.out, pair.student, model, outcome, dtype)
    measure = f"{signal.description}, T = 1, nats per token" if signal else ACROSS_MEASURE
    why = NO_ROOM if pair.same_tokens else OTHER_TOKENS
    summary = outcome.summary(len(held_out_rows) * ids_NS.shape[1], measure, why)
    write_outcome(context.out, outcome.records, summary)
    return summary | outcome.seconds


def _save(out: Path, source: Path, model: PreTrainedModel, outcome: Outcome, dtype: torch.dtype) -> None:
    """model/: the better of both; a student that training did not help is written as it came."""
    if not outcome.better:
        ends = outcome.after.nats, outcome.before.nats
        log.warning("distill: held-out KL %.4f is not below %.4f, the student stays as it was", *ends)
        model = load_student(source, dtype)
    with written_beside(out / "model") as folder:
        save_student(model.to("cpu", dtype), source, folder)
    for scratch in ("checkpoints", CAPTURED):
        shutil.rmtree(out / scratch, ignore_errors=True)


def _judge(pair: Pair, ids_NS: Any, signal: CachedSignal | None, vocab: int, fits: bool) -> Judge:
    """A function from the student to its `Measured`; the teacher is in memory only while it is asked."""

    def across(student: nn.Module) -> Measured:
        teacher = teacher_model(pair.teacher, next(student.parameters()).device)
        term = CrossTokenizerTerm(student, teacher, *pair.tokenizers)
        return Measured(held_out_distance(term, student, torch.from_numpy(ids_NS)), None, "projected_kl_nats")

    def same(student: nn.Module) -> Measured:
        assert signal is not None
        kl_nats = held_out_kl(student, ids_NS, signal, vocab)
        if not fits:
            return Measured(kl_nats, None)
        teacher = teacher_model(pair.teacher, next(student.parameters()).device)
        depths = (len(decoder_layers(model)) for model in (student, teacher))
        return Measured(kl_nats, layer_cka(student, teacher, ids_NS, dict(enumerate(proportional_map(*depths)))))

    return same if signal is not None else across
