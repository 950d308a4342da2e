"""Before anything is trained: is there memory for the student's training, and for the teacher beside it?

A training that the kernel would kill after hours is found out in the first second. What the user asked for by name is
then refused; the default recipe does without, and the log and the report say so.
"""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.config import DistillConfig, StageConfig
from moe_edge.contracts.errors import ResourceProblem
from moe_edge.contracts.units import format_bytes
from moe_edge.distillation.losses import LOSSES
from moe_edge.distillation.schedule import StageSchedule, multipliers_of
from moe_edge.distillation.stage_parts import wants_teacher
from moe_edge.process.placement import free_bytes, held_bytes
from moe_edge.process.ranks import current_ranks

log = logging.getLogger(__name__)
STATE_BYTES = 12  # of a trained weight: its gradient and Adam's two moments
LESS = "a machine with more memory, distill.stages=[] to go on untrained, or more frozen parameters"


def training_device() -> str:
    """Where students are trained and measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def no_room_for_weights(config: DistillConfig, student: CheckpointHeaders, device: str) -> str | None:
    """Why the student cannot be loaded for training, before it is loaded; None: it can.

    Raises:
        ResourceProblem: it cannot, and the stages are the user's own.
    """
    return _verdict(config, held_bytes(student, torch.float32), "the student's weights in float32 need", device)


def no_room_for_training(
    config: DistillConfig, student: nn.Module, schedules: Sequence[StageSchedule], device: str
) -> str | None:
    """The same of gradients and optimizer, with the student in memory."""
    return _verdict(config, _state_bytes(student, schedules), "gradients and Adam's moments need", device)


def room_for_teacher(
    teacher: CheckpointHeaders, student: nn.Module, schedules: Sequence[StageSchedule], device: str
) -> bool:
    """With the student in memory: is there room for its training and for the teacher at once?"""
    needed = held_bytes(teacher, torch.float32) + _state_bytes(student, schedules)
    return needed <= free_bytes(torch.device(device), current_ranks().local_world)


def _state_bytes(student: nn.Module, schedules: Sequence[StageSchedule]) -> int:
    """Gradients and optimizer of the stage that trains most."""
    named = dict(student.named_parameters())
    rates = [multipliers_of(list(named), schedule.config.parameter_lr_multipliers) for schedule in schedules]
    return STATE_BYTES * max(
        sum(named[name].numel() for name, rate in rate_of.items() if rate > 0) for rate_of in rates
    )


def _verdict(config: DistillConfig, needed: int, what: str, device: str) -> str | None:
    free = free_bytes(torch.device(device), current_ranks().local_world)
    if needed <= free:
        return None
    why = f"{what} {format_bytes(needed)}, {format_bytes(free)} are free"
    if "stages" in config.model_fields_set:
        raise ResourceProblem("there is no memory to train", where="distill.stages", why=why, next_command=LESS)
    return f"there is no memory to train: {why}"


def recipe_with_room(config: DistillConfig, fits: bool) -> DistillConfig:
    """The recipe; where the teacher does not fit beside the student, the default one without the losses that need it.

    Raises:
        ResourceProblem: it does not fit, and stages of the user's own need it.
    """
    needy = [stage.stage_name for stage in config.stages if wants_teacher(config, stage)]
    if fits or not needy:
        return config
    if "stages" in config.model_fields_set:
        why = f"{', '.join(needy)}: on-policy rows, teacher routing, a live teacher, or losses on its layers"
        command = "losses on logits alone, such as {ce: 1, kl: 1}, which the cache serves"
        what = "the teacher does not fit in memory beside the student"
        raise ResourceProblem(what, where="distill.stages", why=why, next_command=command)
    log.warning("distill: the teacher does not fit in memory beside the student: cross-entropy and cached KL only")
    return config.model_copy(update={"stages": [_from_cache(stage) for stage in config.stages]})


def _from_cache(stage: StageConfig) -> StageConfig:
    losses = {name: weight for name, weight in stage.losses.items() if not LOSSES[name].teacher}
    return stage.model_copy(update={"losses": losses, "teacher": "cached"})
