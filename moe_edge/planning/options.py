"""One option of the planner (how many experts, stored how, with which KV cache), judged against every budget, and the
table of options.

Units: bytes, tokens per second.
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from moe_edge.contracts.capabilities import RUNTIME_OF_FORMAT, capability
from moe_edge.contracts.errors import InfeasibleError
from moe_edge.contracts.plan import Estimate
from moe_edge.contracts.spec import keepable_counts
from moe_edge.contracts.target import Budget, Target
from moe_edge.contracts.units import format_bytes
from moe_edge.planning.estimate import Cache, KvPrecision, Packing, estimate, kv_precisions, machine_of
from moe_edge.planning.headers import ModelHeaders
from moe_edge.planning.shapes import Shape

ROWS_WHEN_INFEASIBLE = 6


@dataclass(frozen=True)
class BudgetLimits:
    """The absolute budgets; None = not limited."""

    weights_bytes: int | None
    peak_memory_bytes: int | None
    decode_tokens_per_s: float | None


@dataclass(frozen=True)
class Option:
    """A point of the search: what it would be, and which budgets it breaks."""

    experts: int
    shape: Shape
    packing: Packing
    estimate: Estimate  # with the KV cache in it
    broken: tuple[str, ...]  # in words; empty = fits
    excess: float  # the worst ratio of need to budget; at most 1 = fits
    shorter: bool = False  # with a shorter context than the target's

    @property
    def fits(self) -> bool:
        return not self.broken

    def row(self) -> dict[str, Any]:
        """For a table or JSON."""
        return {
            "experts_kept": self.experts,
            "top_k": self.shape.top_k,
            "expert_width": self.shape.width,
            "format": self.packing.format,
            "quantization": self.packing.label,
            "context_length": self.estimate.context_length,
            "kv_precision": self.estimate.kv_precision,
            "file_bytes": self.estimate.file_bytes,
            "peak_memory_bytes": self.estimate.peak_memory_bytes,
            "decode_tokens_per_s": self.estimate.decode_tokens_per_s,
            "fits": self.fits,
            "why_not": "; ".join(self.broken) or None,
        }


@dataclass(frozen=True)
class Space:
    """A model on a target: turns (experts, packing) into a judged option."""

    model: ModelHeaders
    target: Target
    top_k: int
    limits: BudgetLimits
    context_length: int  # tokens
    width: int | None = None  # neurons kept per expert; None = all
    dense: bool = False  # every kept expert is read for every token

    @property
    def shape(self) -> Shape:
        return Shape(self.top_k, self.width)

    @property
    def changes_shape(self) -> bool:
        """Does a token run fewer or narrower experts than in the teacher?"""
        return self.shape != (self.model.spec.moe.top_k, None)

    @property
    def weights_budget(self) -> str:
        """The key of the budget that limits the file: the absolute one, or the share where that is less."""
        absolute = self.limits.weights_bytes == self.target.budget.weights
        return "target.budget.weights" if absolute else "target.budget.bytes"

    def option(self, experts: int, packing: Packing) -> Option:
        """With the best KV cache that fits; where none does, with the smallest."""
        for precision in kv_precisions(self.model, self.target, packing.format):
            option = self.judged(experts, packing, Cache(self.context_length, precision))
            if option.fits:
                break
        return option

    def judged(self, experts: int, packing: Packing, cache: Cache) -> Option:
        top_k = experts if self.dense else self.top_k
        expected = estimate(self.model, self.target, experts, top_k, packing, cache, self.width)
        checks = [
            ("the file", expected.file_bytes, self.limits.weights_bytes, self.weights_budget),
            ("peak memory", expected.peak_memory_bytes, self.limits.peak_memory_bytes, "the memory budget"),
        ]
        broken = [
            f"{what} needs {format_bytes(need)}, {name} is {format_bytes(limit)}"
            for what, need, limit, name in checks
            if limit is not None and need > limit
        ]
        ratios = [need / max(limit, 1) for _, need, limit, _ in checks if limit is not None]
        speed, least = expected.decode_tokens_per_s, self.limits.decode_tokens_per_s
        if speed is not None and least is not None:
            ratios.append(least / speed)
            if speed < least:
                broken.append(f"about {speed:.1f} tokens/s, target.budget.decode_tokens_per_s is {least:g}")
        return Option(experts, self.shape, packing, expected, tuple(broken), max(ratios, default=0.0))

    def stores_padding(self, packing: Packing) -> bool:
        """Where layers keep different numbers of experts: does a file hold the smaller layers' padding experts, too?"""
        row = capability(RUNTIME_OF_FORMAT[packing.format], self.model.spec.family)
        return row is None or row.uneven == "padded"

    def most_experts_of_a_layer(self, choice: Option) -> int:
        """Where layers keep different numbers: the most that one may keep, so that a padded file still meets the budgets."""
        if not self.stores_padding(choice.packing):
            return self.model.spec.moe.experts
        more = [count for count in keepable_counts(self.model.spec, self.top_k) if count >= choice.experts]
        fitting = [count for count in more if self.option(count, choice.packing).fits]
        return max(fitting, default=choice.experts)


def space_of(model: ModelHeaders, target: Target, top_k: int, width: int | None = None, dense: bool = False) -> Space:
    """The space of a model on a target, at the target's own context length or the model's limit."""
    return Space(model, target, top_k, limits_of(target, model), context_lengths(target, model)[0], width, dense)


def largest_contexts(space: Space, option: Option) -> dict[str, int]:
    """KV precision -> the most tokens of context with which an option still meets every budget, up to the model's own
    limit; a precision with which not even one token fits is absent."""
    found = {}
    for precision in kv_precisions(space.model, space.target, option.packing.format):

        def fits(tokens: int, precision: KvPrecision = precision) -> bool:
            return space.judged(option.experts, option.packing, Cache(tokens, precision)).fits

        tokens = bisect_left(range(1, space.model.spec.context_length + 1), True, key=lambda length: not fits(length))
        if tokens:
            found[str(precision)] = tokens
    return found


def context_lengths(target: Target, model: ModelHeaders) -> list[int]:
    """The target's context length, at most what the model can read, and, where the target allows less, its halves down
    to the least."""
    lengths = [min(target.context_length, model.spec.context_length)]
    while target.context_least is not None and lengths[-1] > target.context_least:
        lengths.append(max(lengths[-1] // 2, target.context_least))
    return lengths


def limits_of(target: Target, teacher: ModelHeaders) -> BudgetLimits:
    """The target's budgets in bytes; without a peak-memory budget, what the hardware leaves to one application."""
    peaks = [size for size in (target.budget.peak_memory, machine_of(target).usable_bytes) if size is not None]
    return BudgetLimits(file_limit(target.budget, teacher), min(peaks, default=None), target.budget.decode_tokens_per_s)


def file_limit(budget: Budget, teacher: ModelHeaders) -> int | None:
    """Bytes that the main file may have: the absolute budget and the share of the teacher hold together."""
    share = None if budget.bytes is None else int(budget.bytes * teacher.bytes_at_16_bits)
    return min((size for size in (budget.weights, share) if size is not None), default=None)


def options_grid(space: Space, counts: Collection[int], packings: Sequence[Packing]) -> list[Option]:
    """Every combination, most experts first."""
    return [space.option(count, packing) for count in sorted(set(counts), reverse=True) for packing in packings]


def refusal(
    space: Space, allowed: Sequence[Option], others: Sequence[Option], faster: Option | None = None
) -> InfeasibleError:
    """The refusal with the nearest options.

    Args:
        allowed: what the configuration lets the solver choose; none of them fits.
        others: what it would let choose with other settings; those that fit are named first.
        faster: the least cut of top-k that would meet the budgets, and what would then be chosen.
    """
    fitting = [option for option in others if option.fits]
    fitting.sort(
        key=lambda option: (option.shorter, -(option.estimate.context_length or 0), -option.estimate.file_bytes)
    )
    by_packing: dict[Packing, Option] = {}
    for option in sorted(allowed, key=lambda option: (option.excess, -option.experts)):
        by_packing.setdefault(option.packing, option)
    nearest = list(by_packing.values())
    shown = [*fitting[: ROWS_WHEN_INFEASIBLE // 2], *nearest][:ROWS_WHEN_INFEASIBLE]
    why = f"at top-{space.top_k} the nearest options are:\n" + options_table(shown)
    if faster is not None:
        why += f"\n  at top-{faster.shape.top_k} this would meet every budget:\n" + options_table([faster])
    return InfeasibleError(
        "no plan meets the target's budget",
        where=f"target {space.target.name}, estimated from the headers alone",
        why=why,
        next_command=_remedy(space, *_advisable(space, allowed, fitting), faster),
    )


def _advisable(space: Space, allowed: Sequence[Option], fitting: Sequence[Option]) -> tuple[Option, list[Option]]:
    """The nearest of `allowed`, and those of `fitting`, that keep half of the experts, or as many as were asked for."""
    half = -(-space.model.spec.moe.experts // 2)
    least = min(half, max(option.experts for option in allowed))
    useful = [option for option in allowed if option.experts >= least]
    nearest = min(useful, key=lambda option: (option.excess, -option.experts))
    return nearest, [option for option in fitting if option.experts >= least]


def _remedy(space: Space, nearest: Option, fitting: Sequence[Option], faster: Option | None) -> str:
    lower = f"--set plan.top_k={faster.shape.top_k}" if faster else ""
    if fitting and fitting[0].shorter:
        shorter = f"--set target.context_length={fitting[0].estimate.context_length}"
        return f"{shorter}, or {lower}" if lower else shorter
    if fitting:
        return f"--set plan.experts={fitting[0].experts} --set plan.bits={fitting[0].packing.name}"
    if lower:
        return f"{lower}, or plan.top_k=auto and plan.expert_width=auto, which compare by masked KL"
    need, limits, settings = nearest.estimate, space.limits, []
    if limits.weights_bytes is not None and need.file_bytes > limits.weights_bytes:
        settings.append(f"--set {_larger_file_budget(space, need.file_bytes)}")
    if limits.peak_memory_bytes is not None and need.peak_memory_bytes > limits.peak_memory_bytes:
        settings.append(f"--set target.budget.peak_memory={need.peak_memory_bytes} on a device that has it")
    speed, least = need.decode_tokens_per_s, limits.decode_tokens_per_s
    if speed is not None and least is not None and speed < least:
        settings.append(f"--set target.budget.decode_tokens_per_s={speed:.3g}; no top-k reaches {least:g} here")
    return " ".join(settings)


def _larger_file_budget(space: Space, size: int) -> str:
    """The setting under which a file of this size fits."""
    if space.weights_budget == "target.budget.weights":
        return f"target.budget.weights={size}"
    share = ceil(1e4 * size / space.model.bytes_at_16_bits) / 100  # in percent, upwards
    return f"target.budget.bytes={share:g}%" if share <= 100 else "target.budget.bytes=null"


def _verdict(option: Option) -> str:
    if not option.fits:
        return "; ".join(option.broken)
    return f"fits {option.estimate.context_length} tokens of context" if option.shorter else "fits"


def options_table(options: Sequence[Option]) -> str:
    """Options as aligned text, one per line."""
    rows = [("experts", "type", "file", "KV cache", "peak memory", "tokens/s", "")]
    for option in options:
        speed = option.estimate.decode_tokens_per_s
        row = (
            str(option.experts),
            option.packing.label,
            format_bytes(option.estimate.file_bytes),
            option.estimate.kv_precision,
            format_bytes(option.estimate.peak_memory_bytes),
            "-" if speed is None else f"{speed:.1f}",
            _verdict(option),
        )
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join(
        "    " + "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[6]]).rstrip()
        for row in rows
    )
