"""What the user and the target ask for, checked and turned into ranges: action, experts, width, top-k, formats, types.

Wrong wishes end here with exit code 2 (a configuration that cannot be), 3 (a budget that cannot be met) or 4 (a model that
cannot be treated so), before any work.

Shape suffix legend: E experts of the teacher, F their width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path

from moe_edge.contracts.capabilities import require_paddable
from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.config_io import did_you_mean
from moe_edge.contracts.errors import ConfigError, InfeasibleError, InputRejected
from moe_edge.contracts.onnx_bits import refuse_absent_layers
from moe_edge.contracts.plan import UNEVEN_ACTIONS, WIDTH_STEP, Plan
from moe_edge.contracts.quantization import RECIPE_ORDER, RECIPES
from moe_edge.contracts.spec import ModelSpec, keepable_counts
from moe_edge.distillation.schedule import recipe_of
from moe_edge.formulas.selection import CRITERIA
from moe_edge.models.streaming import meta_model
from moe_edge.models.weights import check_width
from moe_edge.planning.estimate import Packing

MASKABLE_ACTIONS = ("drop", "merge")  # those whose cost masking predicts
DENSE_CRITERION = "cka-dopt"  # the D-optimal choice of arXiv:2605.28207, of a dense student
COMPARES_EXPERTS = {"expert_cka", "expert_diversity"}  # losses that run every expert of a layer
QUALITY_FLOOR = "Q4_K_M"  # below it, dropping experts competes with fewer bits
_BEST_FIRST = ("F32", *RECIPE_ORDER[: RECIPE_ORDER.index(QUALITY_FLOOR) + 1])
_BELOW_FLOOR = RECIPE_ORDER[RECIPE_ORDER.index(QUALITY_FLOOR) + 1 :]


@dataclass(frozen=True)
class Demand:
    """The ranges in which the solver may choose."""

    counts: tuple[int, ...]  # experts kept per layer that the model and the wishes allow, most first
    top_k: int
    width: int | None  # neurons kept per expert; None = all
    why_fewer: str | None  # what forbids keeping all experts, in words
    formats: tuple[str, ...]
    preferred: tuple[Packing, ...]  # of the main file, in the order in which they are tried
    smaller: tuple[Packing, ...]  # below the quality floor, best first
    onnx_precision: str
    uneven: bool = False  # may layers keep different numbers, the counts on average


def demand_of(spec: ModelSpec, config: BuildConfig) -> Demand:
    """The ranges for a model under a configuration whose top-k and width are settled (`shapes.at_shape`).

    Raises:
        ConfigError: impossible top-k, expert count or type, an unknown criterion, or uneven layers with what they do not
            go with.
        InputRejected: uneven layers of a model that cannot be padded exactly; a padded student that would lose experts.
        InfeasibleError: the target's share of experts leaves fewer than top-k.
    """
    _check_criterion(config.plan.criterion)
    if config.plan.uneven:
        _check_uneven(spec, config)
    top_k, full, asked = _top_k(spec, config), spec.moe.expert_width, config.plan.expert_width
    width = asked if isinstance(asked, int) and asked != full else None  # checked by `check_action`
    counts, why_fewer = _nested(*_expert_counts(spec, config, top_k, (width or full) / full), spec, config)
    if spec.moe.experts_per_layer:
        counts, why_fewer = _padded(counts, spec, config), None
    formats = config.target.formats if config.export.formats == "auto" else config.export.formats
    chosen = config.export.onnx.precision
    refuse_absent_layers(config.export.onnx.layer_bits, spec.layers)
    precision = config.target.quantization.onnx if chosen == "auto" else chosen
    if "gguf" in formats:
        preferred, smaller = _gguf_packings(config)
    elif not formats:  # the transformers checkpoint alone
        preferred, smaller = [Packing("gguf", "F16")], []
    else:
        onnx = config.export.onnx
        names = [precision, "int4"] if chosen == "auto" and precision != "int4" else [precision]
        preferred, smaller = [Packing("onnx", name, onnx.block_size, onnx.mix) for name in names], []
    return Demand(
        counts=counts,
        top_k=top_k,
        width=width,
        why_fewer=why_fewer,
        formats=tuple(formats),
        preferred=tuple(preferred),
        smaller=tuple(smaller),
        onnx_precision=precision,
        uneven=config.plan.uneven,
    )


def check_action(config: BuildConfig, headers: CheckpointHeaders, spec: ModelSpec) -> None:
    """Refuse an action that cannot work for this model and target; reads no weight.

    Raises:
        ConfigError: a width that is no multiple of 32, above the teacher's, or combined with an action it does not fit;
            a format that cannot hold a dense student.
        InfeasibleError: a shared core under a byte budget, unless plan.force.
        InputRejected: this family's expert width cannot change.
    """
    settings, width = config.plan, config.plan.expert_width
    if not isinstance(width, str):
        if width < WIDTH_STEP or width % WIDTH_STEP or width > spec.moe.expert_width:
            why = f"expected a multiple of {WIDTH_STEP} up to the teacher's {spec.moe.expert_width}, got {width}"
            raise ConfigError("impossible expert width", where="plan.expert_width", why=why)
        check_width(meta_model(headers), width)
    if settings.within is not None and settings.action == "dense" and settings.criterion == "auto":
        why = f"a dense student takes the choice of {DENSE_CRITERION}, whatever an earlier plan kept"
        raise ConfigError("within does not go with dense under auto", where="plan.within", why=why)
    if settings.action == "shared-core" and settings.compensate is True:
        why = "it refits experts one by one, which a shared core does not have"
        raise ConfigError("compensate does not go with shared-core", where="plan.compensate", why=why)
    if settings.action == "shared-core" and _has_byte_budget(config) and not settings.force:
        raise InfeasibleError(
            "a shared core saves no bytes on the device",
            where="plan.action",
            why="no runtime executes it, so the export folds it into ordinary experts of full size; the target has a "
            "byte budget",
            next_command="--set plan.action=drop or merge, or --set plan.force=true",
        )


def _has_byte_budget(config: BuildConfig) -> bool:
    budget = config.target.budget
    limits = (budget.weights, budget.bytes, budget.peak_memory, config.target.hardware.memory_bytes.value)
    return any(value is not None for value in limits)


def _check_uneven(spec: ModelSpec, config: BuildConfig) -> None:
    """Refuse what layers with different numbers of experts do not go with; see `demand_of`."""
    require_paddable(spec)
    plan, losses = config.plan, {name for stage in recipe_of(config.distill) for name, w in stage.losses.items() if w}
    asked = plan.experts != "auto" or config.target.budget.experts is not None
    compares = f"{', '.join(sorted(COMPARES_EXPERTS))} compare all experts of a layer"
    reasons = {
        "plan.action": (plan.action not in UNEVEN_ACTIONS, f"the action {plan.action} makes one thing of each layer"),
        "plan.within": (plan.within is not None, "nested plans keep equally many experts in every layer"),
        "plan.experts": (not asked, "it deals out a number of experts, which a budget of bytes does not name"),
        "distill.stages": (bool(losses & COMPARES_EXPERTS), compares),
    }
    for where, (wrong, why) in reasons.items():
        if wrong:
            fix = "--set plan.experts=0.625" if where == "plan.experts" else "--set plan.uneven=false"
            raise ConfigError(f"plan.uneven does not go with this {where}", where=where, why=why, next_command=fix)


def _padded(counts: tuple[int, ...], spec: ModelSpec, config: BuildConfig) -> tuple[int, ...]:
    """A student with padded layers stays as it is."""
    total = spec.moe.experts
    if total not in counts or config.plan.action != "drop":
        raise InputRejected(
            "a student with padded layers cannot be compressed again",
            where=f"config.json: {list(spec.moe.experts_per_layer)} experts per layer",
            why="its layers have different numbers of experts",
            next_command="compress its teacher, or --set plan.experts=1.0 --set plan.action=drop",
        )
    return (total,)


def _check_criterion(name: str) -> None:
    known = ["auto", *CRITERIA]
    if name not in known:
        raise ConfigError(
            f"unknown criterion '{name}'{did_you_mean(name, known)}",
            where="plan.criterion",
            why=f"known: {', '.join(known)}",
        )


def _top_k(spec: ModelSpec, config: BuildConfig) -> int:
    asked = config.plan.top_k
    top_k = asked if isinstance(asked, int) else spec.moe.top_k
    if not 1 <= top_k <= spec.moe.experts:
        raise ConfigError(
            f"top-k {top_k} is impossible",
            where="plan.top_k",
            why=f"the teacher has {spec.moe.experts} experts per layer",
        )
    return top_k


def earlier_plan(path: str, spec: ModelSpec) -> Plan:
    """The plan that plan.within names.

    Raises:
        ConfigError: it cannot be read, or belongs to another model.
    """
    where = f"plan.within: {path}"
    try:
        plan = Plan.read(Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError("the earlier plan cannot be read", where=where, why=str(error)) from error
    if plan.experts_total != spec.moe.experts or set(plan.kept) != set(spec.moe_layers):
        why = f"it keeps experts of {len(plan.kept)} layers of {plan.experts_total}"
        raise ConfigError("the earlier plan belongs to another model", where=where, why=why)
    return plan


def _nested(
    counts: tuple[int, ...], why_fewer: str | None, spec: ModelSpec, config: BuildConfig
) -> tuple[tuple[int, ...], str | None]:
    """Only as many as the plan that `plan.within` names has kept."""
    if config.plan.within is None:
        return counts, why_fewer
    most = earlier_plan(config.plan.within, spec).experts_kept
    possible = tuple(count for count in counts if count <= most)
    if not possible:
        raise ConfigError(
            f"cannot keep {counts[-1]} experts of the {most} that an earlier plan kept",
            where="plan.within, plan.experts",
            next_command=f"--set plan.experts={most} or fewer",
        )
    return possible, why_fewer if possible == counts else f"plan.within keeps {most}"


def _expert_counts(
    spec: ModelSpec, config: BuildConfig, top_k: int, width_share: float
) -> tuple[tuple[int, ...], str | None]:
    """(counts, why not all). A count or fraction is meant exactly; a target's share is an upper bound of the
    routed-expert parameters, of which narrower experts have fewer."""
    total, asked, share = spec.moe.experts, config.plan.experts, config.target.budget.experts
    possible = keepable_counts(spec, top_k)
    if asked == "auto":
        most = total if share is None else min(whole_experts(share / width_share, total), total)
        counts = tuple(count for count in reversed(possible) if count <= most)
        if not counts:
            raise _share_too_small(share or 1.0, total, most, top_k, possible, config)
        why = None if most == total else f"target.budget.experts keeps at most {100 * (share or 1):.4g} % of them"
        return counts, why
    count = asked if isinstance(asked, int) else whole_experts(asked, total)
    if not 1 <= count <= total:
        raise ConfigError(
            f"cannot keep {asked} experts",
            where="plan.experts",
            why=f"the teacher has {total} per layer; a fraction lies in (0, 1]",
        )
    if count not in possible:
        raise _impossible_count(count, top_k, spec, possible)
    return (count,), None if count == total else f"plan.experts={asked}"


def _impossible_count(count: int, top_k: int, spec: ModelSpec, possible: Sequence[int]) -> ConfigError:
    if count < top_k:
        return ConfigError(
            f"top-k {top_k} exceeds the {count} kept experts",
            where="plan.experts, plan.top_k",
            why=f"every token is routed to {top_k} experts",
            next_command=f"--set plan.experts={top_k} or more, or --set plan.top_k={count}",
        )
    groups = f"{spec.moe.groups} groups, of which a token searches {spec.moe.groups_used}, keep equally many experts"
    nearest = min(possible, key=lambda other: abs(other - count))
    return ConfigError(
        f"cannot keep {count} experts",
        where="plan.experts",
        why=f"{groups}; possible: {', '.join(map(str, possible))}",
        next_command=f"--set plan.experts={nearest}",
    )


def whole_experts(share: float, total: int) -> int:
    """The most experts whose share of `total` is at most `share`."""
    return floor(share * total + 1e-9)


def _share_too_small(
    share: float, total: int, most: int, top_k: int, possible: Sequence[int], config: BuildConfig
) -> Exception:
    if not possible:
        return ConfigError(f"top-k {top_k} exceeds the experts that a token can reach", where="plan.top_k")
    what = f"{100 * share:.4g} % of {total} experts are {most}, and every token is routed to {top_k}"
    fix = f"--set target.budget.experts={100 * possible[0] / total:.4g}% (at least), or --set plan.top_k={max(most, 1)}"
    if config.plan.top_k != "keep":
        return ConfigError(
            f"top-k {top_k} exceeds the {most} kept experts", where="plan.top_k", why=what, next_command=fix
        )
    return InfeasibleError(
        "the budget of experts cannot be met", where="target.budget.experts", why=what, next_command=fix
    )


def _gguf_packings(config: BuildConfig) -> tuple[list[Packing], list[Packing]]:
    """(preferred and everything at least as good as the floor, what is below it)."""
    bits, wished = config.plan.bits, config.target.quantization.gguf
    if bits != "auto":
        return [_gguf(bits, "plan.bits")], []
    types = config.export.gguf.types
    if types != "auto":
        wished = [name for name in wished if name in types] or types
    preferred = [_gguf(name, "quantization.gguf") for name in wished]
    others = [Packing("gguf", name) for name in _BEST_FIRST[1:]]
    good = list(dict.fromkeys([*preferred, *others]))
    return good, [packing for name in _BELOW_FLOOR if (packing := Packing("gguf", name)) not in good]


def _gguf(name: str, where: str) -> Packing:
    if name not in RECIPES:
        known = list(RECIPES)
        raise ConfigError(
            f"unknown GGUF type '{name}'{did_you_mean(name, known)}", where=where, why=f"known: {', '.join(known)}"
        )
    return Packing("gguf", name)
