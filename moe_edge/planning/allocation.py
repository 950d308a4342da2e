"""The budget solver: how many experts stay and in which quantization, from headers alone.

All budgets hold together. The walk is fixed and explainable: first the most experts that are allowed, in the target's
preferred types and anything better; if that does not fit, at least half of the experts in the smallest of those
types, then in smaller types; then fewer experts, in the type whose prior KL is least. If nothing fits and the target
allows a shorter context, the walk is repeated with it. "Do not prune, quantize harder" is always recorded as the
competitor, and once the masked KL is known the two are compared (decision.py). The expert count is one for all layers,
because llama.cpp's is a scalar; under plan.uneven it is their average.

Units: bytes, nats per token.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

from moe_edge.contracts.capabilities import require_exportable
from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import ConfigError, InfeasibleError
from moe_edge.contracts.plan import KeptExperts
from moe_edge.contracts.spec import keepable_counts
from moe_edge.families import family_of
from moe_edge.planning.bits import prior_sensitivity
from moe_edge.planning.demand import MASKABLE_ACTIONS, Demand, check_action, demand_of
from moe_edge.planning.estimate import Packing
from moe_edge.planning.headers import ModelHeaders, model_headers
from moe_edge.planning.notes import describe, notes_of
from moe_edge.planning.options import Option, Space, context_lengths, options_grid, refusal, space_of
from moe_edge.planning.shapes import Shape, at_shape, shapes_of
from moe_edge.planning.spend import allocate

SHORTEST_CONTEXT = 512  # tokens; of the contexts that a refusal suggests
HARDER_ORDER = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")  # best first
# What a recipe alone costs, KL in nats per token: our recipes with an imatrix on a 135 M parameter Qwen2-MoE, 512 tokens
# (Q2_K: llama.cpp's own mix on the same model, an upper bound). A prior for comparing "quantize harder" with dropping
# experts; larger models lose less at every recipe.
RECIPE_KL_NATS = {
    "F32": 0.0, "F16": 0.001, "Q8_0": 0.012, "Q6_K": 0.020, "Q5_K_M": 0.020,
    "Q4_K_M": 0.021, "Q4_0": 0.040, "Q3_K_M": 0.028, "Q2_K": 0.318,
}  # fmt: skip
# Masked KL of dropping a share of the experts, over the share squared: .19, .47 and 1.17 nats at 25, 37.5 and 50 % of the
# same model by its best criterion. A prior, used only to rank options that drop more than half.
DROPPED_KL_NATS = 4.0


@dataclass(frozen=True)
class BudgetAnswer:
    """What the budget solver chose at one shape, and the other way that lost to it.

    `header_plan` gives the first one, from headers alone; decision.py replaces it by what measured numbers say.
    """

    space: Space
    demand: Demand
    choice: Option
    rival: Option | None  # the competitor
    rival_lost: str  # why
    notes: tuple[str, ...]
    others: tuple["BudgetAnswer", ...] = ()  # the answers at the other shapes, where top-k or the width is auto

    @property
    def model(self) -> ModelHeaders:
        return self.space.model

    @property
    def all_shapes(self) -> tuple["BudgetAnswer", ...]:
        """The answers at every shape that fits, this one first."""
        return (self, *self.others)

    @property
    def keeps_all(self) -> bool:
        return self.choice.experts == self.model.spec.moe.experts

    @property
    def alters(self) -> bool:
        """Does the student compute something else than the teacher, bits aside?"""
        return not self.keeps_all or self.space.changes_shape

    @property
    def needs_measuring(self) -> bool:
        """Does it cost something that only the teacher can tell: experts, top-k, width, or bits below what was preferred?"""
        return self.alters or self.choice.packing not in self.demand.preferred

    @property
    def is_harmless(self) -> bool:
        """Nothing changed, in the type that the target likes best."""
        return not self.alters and self.choice.packing == self.demand.preferred[0]

    @property
    def quantization(self) -> str:
        """The main GGUF recipe; the preferred one where no GGUF is delivered."""
        packing = self.choice.packing
        return packing.name if packing.format == "gguf" else self.space.target.quantization.gguf[0]

    @property
    def onnx_precision(self) -> str:
        return self.choice.packing.name if self.choice.packing.format == "onnx" else self.demand.onnx_precision

    @property
    def all_experts(self) -> KeptExperts:
        """The choice that drops nothing."""
        spec = self.model.spec
        return {layer: list(range(spec.moe.experts)) for layer in spec.moe_layers}

    @property
    def competitor(self) -> str | None:
        return None if self.rival is None else f"{describe(self.rival, self.model)}: {self.rival_lost}"


def header_plan(headers: CheckpointHeaders, config: BuildConfig) -> BudgetAnswer:
    """Solve the budget from headers alone, in about a second.

    Raises:
        ConfigError: impossible wishes (top-k above the kept experts, an unknown type).
        InfeasibleError: nothing fits; the message has the nearest options.
        InputRejected: unsupported model, or one that a demanded format cannot represent.
    """
    model = model_headers(headers)
    check_action(config, headers, model.spec)
    shapes = shapes_of(model.spec, config, headers)
    answers: list[BudgetAnswer] = []
    for shape in shapes:
        answer = _answer(model, at_shape(config, model.spec, shape), alone=len(shapes) == 1)
        if answer is not None:
            answers.append(answer)
        if answer is not None and answer.is_harmless:  # nothing that changes more can lose less
            break
    if not answers:
        raise _refusal(model, config, headers, shapes)
    return replace(answers[0], others=tuple(answers[1:]))


def _answer(model: ModelHeaders, config: BuildConfig, *, alone: bool = True) -> BudgetAnswer | None:
    """The choice at the configuration's own shape; None where nothing fits.

    Args:
        alone: is this the only shape, so that a wish which cannot be is an error and not a reason to try the next one?
    """
    try:
        demand = demand_of(model.spec, config)
    except (ConfigError, InfeasibleError):
        if alone:
            raise
        return None
    require_exportable(model.spec, demand.formats)
    base = _base_space(model, config, demand)
    for length in context_lengths(config.target, model):
        space = replace(base, context_length=length)
        choice = _choose(space, demand) or (_mixed(space, demand) if mixes_are_allowed(demand, config) else None)
        if choice is not None:
            rival = _rival(space, demand, choice)
            lost = "" if rival is None else _why_lost(rival, demand)
            return BudgetAnswer(space, demand, choice, rival, lost, tuple(notes_of(space, demand, choice)))
    return None


def _base_space(model: ModelHeaders, config: BuildConfig, demand: Demand) -> Space:
    return space_of(model, config.target, demand.top_k, demand.width, dense=config.plan.action == "dense")


def _refusal(
    model: ModelHeaders, config: BuildConfig, headers: CheckpointHeaders, shapes: Sequence[Shape]
) -> InfeasibleError:
    """Why no shape fits, in terms of the one with the least change, and which top-k would fit where one was fixed.

    Raises:
        ConfigError: a wish that cannot be at any shape.
    """
    asked = at_shape(config, model.spec, shapes[0])
    demand = demand_of(model.spec, asked)
    base = _base_space(model, asked, demand)
    shortest = replace(base, context_length=context_lengths(config.target, model)[-1])
    faster = _faster(model, asked, headers, demand) if len(shapes) == 1 else None
    return refusal(base, list(_walk(base, demand)), _with_other_settings(shortest, demand), faster)


def _faster(model: ModelHeaders, config: BuildConfig, headers: CheckpointHeaders, demand: Demand) -> Option | None:
    """What would be chosen at the largest smaller top-k at which something fits; None where nothing does, or speed is no
    budget."""
    fixed = family_of(headers.config).fixed_top_k is not None or config.plan.action not in MASKABLE_ACTIONS
    if config.target.budget.decode_tokens_per_s is None or fixed:
        return None

    def choice_at(top_k: int) -> Option | None:
        answer = _answer(model, at_shape(config, model.spec, Shape(top_k, demand.width)), alone=False)
        return None if answer is None else answer.choice

    smaller = range(1, demand.top_k)
    fitting = bisect_left(smaller, True, key=lambda top_k: choice_at(top_k) is None)  # the fewer, the faster
    return choice_at(fitting) if fitting else None


def _with_other_settings(space: Space, demand: Demand) -> list[Option]:
    """What other settings would allow: any count and type, and shorter contexts for what was asked."""
    counts = keepable_counts(space.model.spec, demand.top_k)
    found = options_grid(space, counts, [Packing("gguf", name) for name in HARDER_ORDER])
    length = space.context_length // 2
    while length >= SHORTEST_CONTEXT:
        found += [replace(option, shorter=True) for option in _walk(replace(space, context_length=length), demand)]
        length //= 2
    return found


def _choose(space: Space, demand: Demand) -> Option | None:
    """The first option of the walk that fits; among those that drop more than half, the one with the least prior KL."""
    half, total = -(-space.model.spec.moe.experts // 2), space.model.spec.moe.experts
    fewer: dict[Packing, Option] = {}
    for option in _walk(space, demand):
        if option.fits and option.experts >= min(half, demand.counts[0]):
            return option
        if option.fits:
            fewer.setdefault(option.packing, option)

    def prior_nats(option: Option) -> float:
        return prior_dropped_nats(option.experts, total) + RECIPE_KL_NATS.get(option.packing.name, 0.0)

    return min(fewer.values(), key=prior_nats, default=None)


def mixes_are_allowed(demand: Demand, config: BuildConfig) -> bool:
    """May every class of tensors have its own type? Only where no type was asked for, and no share of the experts, of
    which the recipe is a part; a number of experts says nothing about types."""
    asked = config.plan.bits != "auto" or config.export.gguf.types != "auto"
    share = demand.why_fewer is not None and config.plan.experts == "auto"
    return not asked and "gguf" in demand.formats and not share


def _mixed(space: Space, demand: Demand) -> Option | None:
    """Where no recipe fits, a mix of types may: it can store all classes in the fewest bits. The least prior KL."""
    sensitivity, total = prior_sensitivity(space.model), space.model.spec.moe.experts
    best: tuple[Option | None, float] = (None, inf)
    for count in demand.counts:
        dropped = prior_dropped_nats(count, total)
        if dropped < best[1] and (mix := allocate(space, count, sensitivity)) is not None:
            best = min(best, (mix[0], mix[1] + dropped), key=lambda pair: pair[1])
    return best[0]


def prior_dropped_nats(experts: int, total: int) -> float:
    """Masked KL of keeping `experts` of `total`, before anything has been measured."""
    return DROPPED_KL_NATS * (1 - experts / total) ** 2


def _walk(space: Space, demand: Demand) -> Iterator[Option]:
    """Options in the order of preference."""
    most, half = demand.counts[0], -(-space.model.spec.moe.experts // 2)
    for packing in demand.preferred:
        yield space.option(most, packing)
    smallest = min(demand.preferred, key=lambda packing: space.option(most, packing).estimate.file_bytes)
    many = [count for count in demand.counts if count >= half] or [most]
    few = [count for count in demand.counts if count not in many]
    for counts in (many, few):
        for packing in (smallest, *demand.smaller):
            for experts in counts:
                yield space.option(experts, packing)


def _rival(space: Space, demand: Demand, choice: Option) -> Option | None:
    """Keep every expert at the best recipe that is no larger than the budget allows (or than the choice is)."""
    total = space.model.spec.moe.experts
    if choice.experts == total or "gguf" not in demand.formats:
        return None
    ceiling = space.limits.weights_bytes or choice.estimate.file_bytes
    recipes = [Packing("gguf", name) for name in HARDER_ORDER if name in RECIPE_KL_NATS]
    options = [space.option(total, packing) for packing in recipes]
    return next((option for option in options if option.estimate.file_bytes <= ceiling), options[-1])


def forbidden_reason(rival: Option, demand: Demand) -> str | None:
    """Why the configuration does not let the rival win, in words."""
    if demand.why_fewer is not None:
        return f"not allowed, {demand.why_fewer}"
    if len(demand.preferred) == 1 and rival.packing != demand.preferred[0]:
        return f"not allowed, plan.bits={demand.preferred[0].name}"
    return None


def _why_lost(rival: Option, demand: Demand) -> str:
    reason = forbidden_reason(rival, demand)
    if reason is not None:
        return reason
    if not rival.fits:
        return f"does not fit, {'; '.join(rival.broken)}"
    return "below the quality floor; the masked KL decides once the profile exists"
