"""What an action adds to a plan: the pairs of a merge, the width, the rank, and what must be said about them.

The planner chooses experts by masking them in the teacher, which predicts `drop` exactly. The other actions start from the
same choice (dense from the D-optimal one), so `with_action` completes a finished plan; `check_action` refuses from headers
and configuration alone what cannot work, before hours are spent.
"""

from collections.abc import Callable
from typing import Any

from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import ConfigError, InfeasibleError
from moe_edge.contracts.plan import WIDTH_STEP, Plan
from moe_edge.contracts.spec import ModelSpec
from moe_edge.formulas.merging import assign_merges
from moe_edge.formulas.selection import select
from moe_edge.models.dense import DENSE_OF
from moe_edge.models.streaming import meta_model
from moe_edge.models.weights import check_width
from moe_edge.storage.statistics import Statistics

K_QUANT_STEP = 256  # weights of one super-block of llama.cpp's K-quants
DENSE_CRITERION = "cka-dopt"  # the D-optimal choice of arXiv:2605.28207


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
    return any(
        value is not None for value in (budget.weights, budget.peak_memory, config.target.hardware.memory_bytes.value)
    )


def with_action(
    plan: Plan, config: BuildConfig, spec: ModelSpec, stats: Callable[[], Statistics], in_memory: bool = True
) -> Plan:
    """`plan` (what to drop, and the shape of what stays) completed by what the configured action needs.

    Args:
        stats: reads the profile's statistics; only asked where the action chooses by them.
        in_memory: will `compress` hold the whole teacher? Only then can something be refitted.

    Raises:
        ConfigError: the action needs the profile's CKA, and there is none.
    """
    settings = config.plan
    changes: dict[str, Any] = {
        "action": settings.action,
        "expert_width": _width(plan, config, spec),
        "compensate": settings.compensate is True,
        "sequential": settings.sequential,
        "action_tokens": settings.action_tokens,
        "notes": list(plan.notes),
    }
    if settings.action == "merge":
        changes |= _merges(plan, spec, stats) if plan.prunes else {}
    elif settings.action == "shared-core":
        changes["shared_rank"] = settings.shared_rank
    elif settings.action == "dense" and plan.prunes and settings.criterion == "auto":
        changes |= _d_optimal(plan, spec, stats)
    if settings.action in ("dense", "shared-core"):
        changes["predicted_kl_nats"] = None  # masking predicts what dropping costs
    if settings.compensate == "auto" and in_memory:
        narrower = changes["expert_width"] is not None or plan.top_k < spec.moe.top_k
        changes["compensate"] = settings.action != "shared-core" and (plan.prunes or narrower)
    changes["notes"] = [*plan.notes, *_notes(plan, config, spec, changes)]
    return Plan.model_validate(plan.model_dump(by_alias=True) | changes)


def _width(plan: Plan, config: BuildConfig, spec: ModelSpec) -> int | None:
    """What was asked for; the plan's own choice under keep and auto."""
    asked = config.plan.expert_width
    width = plan.expert_width if isinstance(asked, str) else asked
    return None if width == spec.moe.expert_width else width


def _merges(plan: Plan, spec: ModelSpec, stats: Callable[[], Statistics]) -> dict[str, Any]:
    given = _with_cka(stats(), "merge")
    positions = {layer: position for position, layer in enumerate(spec.moe_layers)}
    pairs = assign_merges(given, {positions[layer]: ids for layer, ids in plan.kept.items()})
    return {"merges": {layer: pairs[positions[layer]] for layer in plan.kept}}


def _d_optimal(plan: Plan, spec: ModelSpec, stats: Callable[[], Statistics]) -> dict[str, Any]:
    chosen = select(DENSE_CRITERION, _with_cka(stats(), "dense"), plan.experts_kept, groups=spec.moe.groups)
    kept = {layer: chosen[position] for position, layer in enumerate(spec.moe_layers)}
    return {"kept": kept, "criterion": DENSE_CRITERION}


def _with_cka(stats: Statistics, action: str) -> Statistics:
    if stats.cka_tokens:
        return stats
    why = "the profile has no CKA: profile.cka_tokens is 0"
    command = "--set profile.cka_tokens=8192"
    raise ConfigError(
        f"the action {action} needs a profile with CKA", where="plan.action", why=why, next_command=command
    )


def _notes(plan: Plan, config: BuildConfig, spec: ModelSpec, changes: dict[str, Any]) -> list[str]:
    """What an action means for the numbers beside it."""
    notes, action, width = [], config.plan.action, changes["expert_width"]
    if action == "merge":
        proposed = sum(len(pairs) for pairs in changes.get("merges", {}).values())
        total = len(spec.moe_layers) * (spec.moe.experts - plan.experts_kept)
        notes.append(
            f"CKA proposes {proposed} merges for {total} dropped experts; compress tests every pair and drops the others. "
            "The predicted KL is that of dropping them all."
        )
    if action == "shared-core":
        notes.append(
            "The shared core is trainable, but no runtime executes it: the export folds it into ordinary experts, so that "
            "the file is as large as after dropping. Bytes and speed here are those of the folded student; its KL is not "
            "predicted by masking."
        )
    if action == "dense":
        kind = DENSE_OF.get(spec.family)
        stored = (
            f"a {kind} checkpoint" if kind else f"a {spec.family} checkpoint with one expert, since no dense class fits"
        )
        notes.append(
            f"The dense student ({stored}) runs {plan.experts_kept} experts for every token, not {plan.top_k}, and needs "
            "distillation; its KL is not predicted by masking."
        )
    if width is not None:
        rows = (
            "" if width % K_QUANT_STEP == 0 else f" {width} is no multiple of {K_QUANT_STEP}: K-quants fall back there."
        )
        notes.append(
            f"Experts keep {width} of {spec.moe.expert_width} neurons; the predicted KL is with the others silent.{rows}"
        )
    if changes["compensate"]:
        notes.append("Down projections are refitted by compress; masking does not count the gain.")
    return notes
