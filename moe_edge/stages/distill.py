"""distill: the compressed student recovers by learning from its teacher; writes model/, metrics.json and train_log.jsonl.

The student that leaves this stage is the better one on rows that were never trained on: if training did not lower the held-out
KL, the student of `compress` goes on unchanged and the summary says so. What it has in common with the training of a user's
own student (distill_pair.py) is distillation/run.py.
"""

import logging
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moe_edge.contracts.artifacts import CompressFolder, DistillSummary, PlanFolder, ProfileFolder
from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.config import BuildConfig
from moe_edge.distillation.data import rows_and_signal
from moe_edge.distillation.memory import MemoryPolicy
from moe_edge.distillation.outcome import write_outcome
from moe_edge.distillation.run import Distillation, distilled, require_shareable
from moe_edge.distillation.schedule import recipe_of
from moe_edge.distillation.teacher import on_device, reference_teacher
from moe_edge.models import students
from moe_edge.models.loading import load_tokenizer, save_student
from moe_edge.process.placement import compute_device
from moe_edge.process.ranks import current_ranks
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.folders import written_beside

log = logging.getLogger(__name__)


def run(
    config: BuildConfig,
    teacher: Teacher,
    out: Path,
    *,
    profile: ProfileFolder,
    plan: PlanFolder,
    compress: CompressFolder,
) -> DistillSummary | None:
    """Train the student of `compress`, keep the better of before and after; None in processes that only help.

    Raises:
        ConfigError, InputRejected, ResourceProblem: as `distilled`; or the logit cache belongs to another teacher.
    """
    default, device = config.distill.stages == "auto", compute_device()
    wanted = config.distill.model_copy(update={"stages": recipe_of(config.distill)})
    memory = MemoryPolicy(wanted, out, device, optional=default, shrinks=default)
    if reason := current_ranks().lead(lambda: _nothing_to_train(memory, plan, compress)):
        return _unchanged(compress, out, reason)
    require_shareable(wanted)
    with rows_and_signal(config, teacher, out, profile) as (rows, signal):
        result = distilled(
            Distillation(
                memory=memory,
                teacher=teacher,
                student=compress.model,
                tokenizers=(load_tokenizer(compress.model), load_tokenizer(teacher.path)),
                rows=rows,
                signal=signal,
                kept=plan.plan.kept if plan.plan.prunes else None,
                load=partial(students.load_student, students.trainable_folder(compress.path)),
                load_teacher=partial(reference_teacher, teacher.path, device),
                save=partial(_save, compress, out),
            )
        )
    return _unchanged(compress, out, result) if isinstance(result, str) else result


def _nothing_to_train(memory: MemoryPolicy, plan: PlanFolder, compress: CompressFolder) -> str | None:
    if not memory.config.stages:
        return "distill.stages is empty"
    if not plan.plan.alters:
        return "the plan changes no expert, so there is nothing to recover"
    return memory.no_room_for_weights(inspect_checkpoint(compress.model))


def _unchanged(compress: CompressFolder, out: Path, reason: str) -> DistillSummary | None:
    if not current_ranks().leads:
        return None
    log.warning("distill: %s; the student goes on unchanged", reason)
    students.mirror_student(compress.path, out)
    summary = DistillSummary(trained=False, kept="untrained", reason=reason)
    write_outcome(out, [], summary)
    return summary


def _save(compress: CompressFolder, out: Path, student: PreTrainedModel, dtype: torch.dtype, better: bool) -> None:
    """model/, and the trainable form of shared cores; an untrained student is a twin of the one in `compress`."""
    if not better:
        students.mirror_student(compress.path, out)
        return
    student = on_device(student, torch.device("cpu"), dtype)
    if students.is_shared_core(student):
        students.save_trainable(student, compress.model, out / students.TRAINABLE)
    with written_beside(out / "model") as folder:
        save_student(students.plain_form(student), compress.model, folder)
