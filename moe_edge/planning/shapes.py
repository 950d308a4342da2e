"""Top-k and expert width as variables: the few values of each that a plan set to `auto` compares.

Both cut what is read per token, which dropping experts does not. Under `auto` a plan tries every pair of a short ladder that
the budget admits, the least change first; masking measures what each costs. Width is `auto` by default: on both models that
were measured, all experts at half their width lose less than the fewer whole ones of the same budget, and take fewer bytes
(README, "Honest numbers"). Top-k stays unless asked. A plan told the number of experts to keep, or to keep different
numbers of them, keeps them whole.

Shape suffix legend: E experts, F expert width.
"""

import logging
from typing import NamedTuple

from moe_edge.compression.on_disk import held_whole
from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.contracts.spec import ModelSpec
from moe_edge.families import family_of
from moe_edge.models.streaming import meta_model
from moe_edge.models.weights import check_width
from moe_edge.planning.demand import MASKABLE_ACTIONS

log = logging.getLogger(__name__)
TOP_K_SHARES = (1.0, 0.75, 0.5, 0.25)  # of the teacher's, and 1 in the end
WIDTH_SHARES = (1.0, 0.75, 0.5)
FINE_STEP, COARSE_STEP = 32, 256  # neurons; K-quants want the coarse one, which narrow experts do not leave room for


class Shape(NamedTuple):
    """How many experts a token runs, and how wide they are."""

    top_k: int
    width: int | None = None  # neurons kept per expert; None = all


def shapes_of(spec: ModelSpec, config: BuildConfig, headers: CheckpointHeaders) -> list[Shape]:
    """The shapes that a plan may choose from, the least change first; a single one unless something is `auto`.

    Raises:
        ConfigError: an automatic top-k with an action whose cost masking does not predict, or with uneven layers.
    """
    plan = config.plan
    masks = plan.action in MASKABLE_ACTIONS
    if plan.top_k == "auto" and not masks:
        raise ConfigError(
            f"auto does not go with the action {plan.action}",
            where="plan.top_k",
            why="shapes are compared by masking experts and neurons in the teacher, which predicts what dropping costs",
            next_command="--set plan.top_k=keep, or a number",
        )
    if plan.top_k == "auto" and plan.uneven:
        why = "how many experts a layer must keep depends on top-k"
        raise ConfigError(
            "auto does not go with plan.uneven", where="plan.top_k", why=why, next_command="--set plan.top_k=keep"
        )
    free = plan.expert_width == "auto" and not isinstance(plan.experts, int) and masks and not plan.uneven
    counts = _top_k_ladder(spec, headers) if plan.top_k == "auto" else [_fixed_top_k(spec, config)]
    widths = _width_ladder(spec, headers, config) if free else [_fixed_width(spec, config)]
    shapes = [Shape(top_k, width) for top_k in counts for width in widths]
    return sorted(shapes, key=lambda shape: -shape.top_k * (shape.width or spec.moe.expert_width))


def at_shape(config: BuildConfig, spec: ModelSpec, shape: Shape) -> BuildConfig:
    """The configuration as if its top-k and width had been asked for."""
    wanted = {
        "top_k": "keep" if shape.top_k == spec.moe.top_k else shape.top_k,
        "expert_width": "keep" if shape.width is None else shape.width,
    }
    return config.model_copy(update={"plan": config.plan.model_copy(update=wanted)})


def _fixed_top_k(spec: ModelSpec, config: BuildConfig) -> int:
    return config.plan.top_k if isinstance(config.plan.top_k, int) else spec.moe.top_k


def _fixed_width(spec: ModelSpec, config: BuildConfig) -> int | None:
    asked = config.plan.expert_width
    return asked if isinstance(asked, int) and asked != spec.moe.expert_width else None


def _top_k_ladder(spec: ModelSpec, headers: CheckpointHeaders) -> list[int]:
    if family_of(headers.config).fixed_top_k is not None:
        return [spec.moe.top_k]
    values = {max(1, int(share * spec.moe.top_k)) for share in TOP_K_SHARES} | {1}
    return sorted(values, reverse=True)


def _width_ladder(spec: ModelSpec, headers: CheckpointHeaders, config: BuildConfig) -> list[int | None]:
    """None first; only that where other tensors take their size from the experts' width, or the teacher is not held
    whole."""
    if not held_whole(headers, config.profile.mode):
        log.info(
            "plan.expert_width=auto: the teacher is not held in memory, so that its experts stay as wide as they are"
        )
        return [None]
    full = spec.moe.expert_width
    step = COARSE_STEP if full >= 2 * COARSE_STEP else FINE_STEP
    values = {int(share * full) // step * step for share in WIDTH_SHARES} - {0, full}
    narrower = sorted((value for value in values if value < full), reverse=True)
    try:
        for width in narrower[:1]:
            check_width(meta_model(headers), width)
    except InputRejected:
        narrower = []
    return [None, *narrower]
