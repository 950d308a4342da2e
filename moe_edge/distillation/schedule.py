"""What is trained when: the stages, the rows of each in order, its steps, and each parameter's rate.

All of it is decided before the first step and depends on the configuration and the seed alone, so that a resumed run
sees the rows that the uninterrupted one would have seen. The stages walk on through one endless, seeded order of the
training rows: a later stage begins where the earlier one stopped.
"""

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moe_edge.contracts.config import DistillConfig, LrMultiplier, StageConfig
from moe_edge.contracts.errors import ConfigError

log = logging.getLogger(__name__)
AUTO_RATE, AUTO_WIDTH = 5e-4, 256  # won on the demo teacher, whose width that is
MICRO_BATCH_TOKENS = 1024  # a micro-batch is two rows where they are short, else one


@dataclass(frozen=True)
class StageSchedule:
    """One stage, resolved."""

    name: str
    rows: list[int]  # row indices, batch after batch; steps x batch_rows of them
    batch_rows: int
    warmup_steps: int
    config: StageConfig

    @property
    def steps(self) -> int:
        return len(self.rows) // self.batch_rows


def recipe_of(config: DistillConfig) -> list[StageConfig]:
    """The stages of a configuration; `auto` is one that trains everything on `{ce: 1, kl: 1, cka: 0.5}`.

    Its teacher is live: the CKA term runs it on every row anyway.
    """
    if isinstance(config.stages, list):
        return config.stages
    return [StageConfig(stage_name="all", share=1.0, teacher="live")]


def schedule_stages(config: DistillConfig, rows: Sequence[int], row_tokens: int) -> list[StageSchedule]:
    """Every stage with its rows and steps.

    Raises:
        ConfigError: a stage says in no way, or in two, how long it lasts; two stages share a name.
    """
    stages = recipe_of(config)
    names = [stage.stage_name for stage in stages]
    if len(set(names)) < len(names):
        raise ConfigError("two stages have the same name", where="distill.stages: stage_name", why=", ".join(names))
    order = _endless(rows, config.seed)
    schedules = []
    for stage in stages:
        steps = _steps(stage, config, len(rows), row_tokens)
        taken = _taken(order, steps, stage, config.batch_rows)
        warmup = math.ceil(stage.warmup_share * steps)
        schedules.append(StageSchedule(stage.stage_name, taken, config.batch_rows, warmup, stage))
    return schedules


def _taken(order: Iterator[int], steps: int, stage: StageConfig, batch_rows: int) -> list[int]:
    """The rows of a stage's steps from the endless order, each batch M times where knowledge augmentation asks for that."""
    times = updates_per_batch(stage)
    batches = [[next(order) for _ in range(batch_rows)] for _ in range(math.ceil(steps / times))]
    return [row for batch in batches for _ in range(times) for row in batch][: steps * batch_rows]


def updates_per_batch(stage: StageConfig) -> int:
    """How many steps in a row train on one batch: M where knowledge augmentation follows the paper's algorithm 1, else 1."""
    routing = stage.teacher_routing
    return routing.draws if routing.policy == "ka" and routing.mode == "paper" else 1


def _endless(rows: Sequence[int], seed: int) -> Iterator[int]:
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.permutation(rows).tolist()


def _steps(stage: StageConfig, config: DistillConfig, rows: int, row_tokens: int) -> int:
    lengths = {"share": stage.share, "steps": stage.steps, "num_epochs": stage.num_epochs}
    given = [name for name, value in lengths.items() if value is not None]
    if len(given) != 1:
        why = f"give exactly one of share, steps and num_epochs; given: {', '.join(given) or 'none'}"
        raise ConfigError(f"how long does the stage '{stage.stage_name}' last?", where="distill.stages", why=why)
    if stage.steps is not None:
        return stage.steps
    if stage.num_epochs is not None:
        return max(1, math.ceil(stage.num_epochs * rows / config.batch_rows))
    assert stage.share is not None
    return max(1, round(stage.share * config.tokens / (config.batch_rows * row_tokens)))


def rows_of_process(batch_rows: int, processes: int) -> int:
    """A process's share of the rows of a step.

    Raises:
        ConfigError: the processes cannot have equal shares.
    """
    if batch_rows % processes:
        why = f"{processes} processes cannot share them equally, and a step of another size would be another training"
        next_command = f"--set distill.batch_rows={math.ceil(batch_rows / processes) * processes}"
        where = f"distill.batch_rows: {batch_rows}"
        raise ConfigError("the rows of a step cannot be shared", where=where, why=why, next_command=next_command)
    return batch_rows // processes


def micro_rows(batch_rows: int, row_tokens: int) -> int:
    """Rows per forward pass: two where they fit and divide the batch, else one."""
    return 2 if batch_rows % 2 == 0 and 2 * row_tokens <= MICRO_BATCH_TOKENS else 1


def full_rate(stage: StageConfig, hidden_size: int) -> float:
    """A stage's learning rate; `auto` is AUTO_RATE at a width of AUTO_WIDTH and falls with its square.

    Under Adam every weight moves by about the rate, and a hidden unit sums as many weights as the model is wide: one factor of
    the width is muP's (Yang et al. 2022, arXiv:2203.03466, table 3). The other is measured: a pretrained model of width 576
    lost by 2.2e-4, muP's rate, and gained by 1e-4; it leads to the usual 1e-5 at a width of 2048.
    """
    return AUTO_RATE * (AUTO_WIDTH / hidden_size) ** 2 if stage.learning_rate == "auto" else stage.learning_rate


def rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the full learning rate at a step counted from 0: a linear rise, then a cosine towards 0.

    No step is wasted at a rate of 0, which matters where a stage has a dozen steps.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def multipliers_of(names: Sequence[str], multipliers: Sequence[LrMultiplier]) -> dict[str, float]:
    """{parameter name: learning-rate multiplier}; the first pattern found in a name decides, without one it is 1.

    Raises:
        ConfigError: a pattern that decides nothing, or nothing is left to train.
    """
    patterns = [(re.compile(row.pattern), row.lr_multiplier) for row in multipliers]
    decided = [0] * len(patterns)
    result, unmatched = {}, []
    for name in names:
        hit = next((index for index, (pattern, _) in enumerate(patterns) if pattern.search(name)), None)
        if hit is None:
            unmatched.append(name)
        else:
            decided[hit] += 1
        result[name] = 1.0 if hit is None else patterns[hit][1]
    for index, (pattern, _) in enumerate(patterns):
        if not decided[index]:
            raise _dead(pattern, names)
    if unmatched:
        log.info("no pattern matches %d parameters, which train at the full rate: %s", len(unmatched), unmatched)
    if not any(result.values()):
        raise ConfigError("every parameter is frozen", where="distill.stages: parameter_lr_multipliers")
    return result


def _dead(pattern: re.Pattern[str], names: Sequence[str]) -> ConfigError:
    taken = sum(1 for name in names if pattern.search(name))
    why = f"earlier patterns take all {taken} parameters it matches" if taken else "it matches no parameter"
    where = "distill.stages: parameter_lr_multipliers"
    examples = ", ".join(list(names)[:3])
    return ConfigError(
        f"the pattern '{pattern.pattern}' has no effect", where=where, why=f"{why}; names are like {examples}"
    )
