"""`moe-edge distill TEACHER --student MODEL`: a student that the user brings learns from a mixture, whatever it is itself.

Dense or a mixture, of another depth or width, with the teacher's tokenizer or another one. With the same tokenizer every
loss of the recipe is at hand and the held-out measure is the KL to the teacher; with another one only the losses that
bridge tokenizers (and those on the student alone), and the measure is `projected_kl`. No profile, no plan: nothing is
pruned. What comes out is a checkpoint folder for `moe-edge export`.
"""

import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moe_edge.contracts.artifacts import DistillSummary
from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.config import BuildConfig, DistillConfig, Loss, StageConfig
from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.distillation.data import rows_across, rows_and_signal
from moe_edge.distillation.memory import MemoryPolicy
from moe_edge.distillation.run import Distillation, distilled, require_shareable
from moe_edge.distillation.stage_parts import losses_on_tokens
from moe_edge.distillation.teacher import on_device, teacher_model
from moe_edge.distillation.terms import unfit
from moe_edge.distillation.tokenizer_pair import require_same_tokenizer, tokenizer_differences
from moe_edge.models.loading import load_tokenizer, save_student
from moe_edge.models.students import is_shared_core, load_student
from moe_edge.process.placement import compute_device
from moe_edge.process.ranks import current_ranks
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.folders import written_beside

log = logging.getLogger(__name__)
SAME: dict[Loss, float] = {"ce": 1.0, "kl": 1.0, "cka": 0.5}
ACROSS: dict[Loss, float] = {"ce": 1.0, "projected_kl": 1.0}


def run(config: BuildConfig, teacher: Teacher, out: Path, *, student: Path) -> DistillSummary | None:
    """Train `student` on the teacher's word, keep the better of before and after; None in processes that only help.

    Raises:
        ConfigError, InputRejected, ResourceProblem: as `distilled`; or there are no stages, or the student has shared cores.
    """
    tokenizers, device = (load_tokenizer(student), load_tokenizer(teacher.path)), compute_device()
    same_tokens = not tokenizer_differences(*tokenizers)
    wanted = config.distill.model_copy(update={"stages": _stages(config.distill, same_tokens)})
    require_same_tokenizer(*tokenizers, losses_on_tokens(wanted))
    require_shareable(wanted)
    shrinks = same_tokens and config.distill.stages == "auto"  # across tokenizers there is no cache to fall back on
    memory = MemoryPolicy(wanted, out, device, optional=False, shrinks=shrinks)
    current_ranks().lead(lambda: memory.no_room_for_weights(inspect_checkpoint(student)))
    opened = rows_and_signal(config, teacher, out) if same_tokens else nullcontext((rows_across(config, student), None))
    with opened as (rows, signal):
        result = distilled(
            Distillation(
                memory=memory,
                teacher=teacher,
                student=student,
                tokenizers=tokenizers,
                rows=rows,
                signal=signal,
                kept=None,
                load=partial(_loaded, student),
                load_teacher=partial(teacher_model, teacher.path, device),
                save=partial(_save, student, out),
            )
        )
    assert not isinstance(result, str)  # a training that was asked for by name is never left out
    return result


def _stages(config: DistillConfig, same_tokens: bool) -> list[StageConfig]:
    """The user's stages, or one that every pair can have; raises ConfigError for what no pair can."""
    if not isinstance(config.stages, list):
        losses = SAME if same_tokens else ACROSS
        log.info("distill: no stages are given; one with %s", ", ".join(f"{name} {losses[name]:g}" for name in losses))
        return [StageConfig(stage_name="all", share=1.0, losses=losses, layer_map="proportional", teacher="live")]
    if not config.stages:
        raise ConfigError("there is nothing to train", where="distill.stages", why="the list is empty")
    if any(stage.losses.get("routing_kl") for stage in config.stages):
        raise unfit("routing_kl", "a student whose experts are some of the teacher's", "its experts are its own")
    return config.stages


def _loaded(student: Path) -> PreTrainedModel:
    model = load_student(student)
    if is_shared_core(model):
        why = "its trainable form belongs to the build that made it"
        raise InputRejected("a student with shared cores is trained by its build", where=str(student), why=why)
    return model


def _save(source: Path, out: Path, student: PreTrainedModel, dtype: torch.dtype, better: bool) -> None:
    """model/: the better of both; a student that training did not help is written as it came."""
    if not better:
        student = load_student(source, dtype)
    with written_beside(out / "model") as folder:
        save_student(on_device(student, torch.device("cpu"), dtype), source, folder)
