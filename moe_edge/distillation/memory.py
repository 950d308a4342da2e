"""Is there memory for the student's training, and for the teacher beside it; decided once, before the first step.

A training that the kernel would kill after hours is found out in the first second. What the user asked for by name is
then refused; the default stages do without, and the log and the report say so. What was decided is kept in the stage's
folder: a resumed training goes on with the same stages, whatever memory is free by then, or is refused.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from moe_edge.contracts.artifacts import DistillFolder
from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.config import DistillConfig, StageConfig
from moe_edge.contracts.errors import ResourceProblem
from moe_edge.contracts.units import format_bytes
from moe_edge.distillation.losses import LOSSES
from moe_edge.distillation.schedule import multipliers_of, recipe_of
from moe_edge.distillation.stage_parts import wants_teacher
from moe_edge.process.placement import free_bytes, held_bytes
from moe_edge.process.ranks import current_ranks
from moe_edge.storage.files import read_json, write_json_atomic

log = logging.getLogger(__name__)
STATE_BYTES = 12  # of a trained weight: its gradient and Adam's two moments
LESS = "a machine with more memory, distill.stages=[] to go on untrained, or more frozen parameters"
AGAIN = "free some memory and repeat the command, or begin again with --fresh"


class TrainingRecipe(BaseModel):
    """The stages as they are trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_: Literal["moe-edge/distill-recipe@1"] = Field("moe-edge/distill-recipe@1", alias="schema")
    stages: list[StageConfig]


@dataclass(frozen=True)
class MemoryPolicy:
    """What one distillation does where memory is short; asked by the leader alone.

    `config`: with the stages that are wanted. `optional`: may it be left out? `shrinks`: may its stages do without the
    teacher? Both only where the user asked for no stages by name.
    """

    config: DistillConfig
    out: Path
    device: torch.device
    optional: bool
    shrinks: bool

    @property
    def kept(self) -> list[StageConfig] | None:
        """The stages that an interrupted run began with."""
        path = self.out / DistillFolder.RECIPE
        return TrainingRecipe.model_validate(read_json(path)).stages if path.is_file() else None

    def no_room_for_weights(self, student: CheckpointHeaders) -> str | None:
        """Why the student cannot be loaded for training, before it is loaded; None: it can.

        Raises:
            ResourceProblem: it cannot, and its training must not be left out.
        """
        return self._shortage(held_bytes(student, torch.float32), "the student's weights in float32 need")

    def no_room_for_training(self, student: nn.Module, stages: Sequence[StageConfig]) -> str | None:
        """The same of gradients and optimizer, with the student in memory."""
        return self._shortage(_state_bytes(student, stages), "gradients and Adam's moments need")

    def _shortage(self, needed: int, what: str) -> str | None:
        free = self._free_bytes()
        if needed <= free:
            return None
        why = f"{what} {format_bytes(needed)}, {format_bytes(free)} are free"
        if self.kept is not None:
            raise self._less_than_before(why)
        if not self.optional:
            raise ResourceProblem("there is no memory to train", where="distill.stages", why=why, next_command=LESS)
        return f"there is no memory to train: {why}"

    def stages(self, fits: bool) -> list[StageConfig]:
        """What to train, before the student is loaded: as an interrupted run began, else what the teacher's size allows.

        Args:
            fits: does the teacher fit in memory, as far as its headers tell?

        Raises:
            ResourceProblem: it does not, and stages of the user's own need it.
        """
        return self.kept or self._with_room(recipe_of(self.config), fits)

    def settled(self, stages: list[StageConfig], student: nn.Module, teacher: CheckpointHeaders) -> list[StageConfig]:
        """What is trained, with the student in memory: is there room for its training and for the teacher at once?

        Written down the first time.

        Raises:
            ResourceProblem: there is none, and these stages must not do without.
        """
        needed, free = held_bytes(teacher, torch.float32) + _state_bytes(student, stages), self._free_bytes()
        if self.kept is None:
            stages = self._with_room(stages, needed <= free)
            write_json_atomic(
                self.out / DistillFolder.RECIPE,
                TrainingRecipe(schema="moe-edge/distill-recipe@1", stages=stages).model_dump(
                    mode="json", by_alias=True
                ),
            )
        elif needed > free and self._with_teacher(stages):
            why = f"the teacher and the training need {format_bytes(needed)}, {format_bytes(free)} are free"
            raise self._less_than_before(why)
        return stages

    def _with_teacher(self, stages: Sequence[StageConfig]) -> list[str]:
        """Names of the stages that need the teacher in memory."""
        return [stage.stage_name for stage in stages if wants_teacher(self.config, stage)]

    def _with_room(self, stages: list[StageConfig], fits: bool) -> list[StageConfig]:
        names = self._with_teacher(stages)
        if fits or not names:
            return stages
        if not self.shrinks:
            why = f"{', '.join(names)}: on-policy rows, teacher routing, a live teacher, or losses on its layers"
            command = "losses on logits alone, such as {ce: 1, kl: 1}, which the cache serves"
            what = "the teacher does not fit in memory beside the student"
            raise ResourceProblem(what, where="distill.stages", why=why, next_command=command)
        log.warning("distill: the teacher does not fit in memory beside the student: cross-entropy and cached KL only")
        return [_from_cache(stage) for stage in stages]

    def _free_bytes(self) -> int:
        return free_bytes(self.device, current_ranks().local_world)

    def _less_than_before(self, why: str) -> ResourceProblem:
        what = "there is less memory than when this training began"
        return ResourceProblem(what, where=str(self.out / DistillFolder.RECIPE), why=why, next_command=AGAIN)


def _state_bytes(student: nn.Module, stages: Sequence[StageConfig]) -> int:
    """Gradients and optimizer of the stage that trains most."""
    named = dict(student.named_parameters())
    rates = [multipliers_of(list(named), stage.parameter_lr_multipliers) for stage in stages]
    return STATE_BYTES * max(
        sum(named[name].numel() for name, rate in rate_of.items() if rate > 0) for rate_of in rates
    )


def _from_cache(stage: StageConfig) -> StageConfig:
    losses = {name: weight for name, weight in stage.losses.items() if not LOSSES[name].teacher}
    return stage.model_copy(update={"losses": losses, "teacher": "cached"})
