"""A dry run: what fits, what it costs and why, without a weight.

Expected KLs are priors here; a finished plan of the same wishes has the measured ones, and is shown beside them.

Shape suffixes: L MoE layers, E experts.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.manifest import read_manifest
from moe_edge.contracts.plan import Plan
from moe_edge.contracts.spec import keepable_counts
from moe_edge.models.students import describe_model
from moe_edge.planning.allocation import BudgetAnswer, header_plan
from moe_edge.planning.candidates import read_statistics
from moe_edge.planning.decision import decide_by_priors
from moe_edge.planning.judging import candidates_of, choices_of
from moe_edge.planning.options import Option, largest_contexts, options_grid


def dry_run(
    headers: CheckpointHeaders, config: BuildConfig, profile: Path | None = None, finished: Path | None = None
) -> dict[str, Any]:
    """`describe_options` of the headers' own answer.

    Raises:
        As `header_plan`.
    """
    return describe_options(header_plan(headers, config), headers, config, profile, finished)


def describe_options(
    answer: BudgetAnswer,
    headers: CheckpointHeaders,
    config: BuildConfig,
    profile: Path | None = None,
    finished: Path | None = None,
) -> dict[str, Any]:
    """What fits, what it costs and why, from headers alone (and what a profile or a finished plan tells, if there is one).

    Args:
        answer: solved from headers alone.
        profile: the folder of a finished profile.
        finished: the folder of a finished plan of this teacher.

    Returns:
        JSON-able {teacher, target, budget, choice, competitor, options, shapes, criteria, notes, measured}; sizes in bytes.
    """
    decided = decide_by_priors(answer, config)
    choice, space, spec = decided.choice, decided.space, decided.model.spec
    return {
        "teacher": describe_model(headers),
        "target": config.target.name,
        "budget": config.target.budget.model_dump(mode="json", exclude_none=True),
        "choice": {
            "experts_kept": choice.experts,
            "experts_total": spec.moe.experts,
            "top_k": space.top_k,
            "expert_width": space.width,
            "quantization": choice.packing.label if choice.packing.format == "gguf" else decided.quantization,
            "onnx_precision": decided.onnx_precision,
            "estimate": choice.estimate.model_dump(mode="json"),
            "largest_contexts": largest_contexts(space, choice),
            "context_limit": spec.context_length,
        },
        "competitor": decided.competitor,
        "options": [option.row() for option in shown_options(decided)],
        "shapes": [one.choice.row() for one in answer.all_shapes] if answer.others else [],
        "criteria": _shares_by_criterion(decided, config, profile),
        "notes": list(decided.notes),
        "measured": _finished_plan(finished, config),
    }


def shown_options(answer: BudgetAnswer) -> list[Option]:
    """The table: a few expert counts times the usual types."""
    total, demand = answer.model.spec.moe.experts, answer.demand
    counts = {total, total * 3 // 4, total * 5 // 8, total // 2, demand.counts[0], answer.choice.experts}
    packings = list(dict.fromkeys([*demand.preferred, *demand.smaller]))
    shown = [packing for packing in packings if packing.name not in ("F32", "F16")] or packings
    return options_grid(answer.space, counts & set(keepable_counts(answer.model.spec, demand.top_k)), shown)


def _shares_by_criterion(answer: BudgetAnswer, config: BuildConfig, profile: Path | None) -> list[dict[str, Any]]:
    """Per criterion, how much of the teacher's routing the kept experts carried; needs no model."""
    path = None if profile is None else profile / "statistics.safetensors"
    if path is None or answer.keeps_all or not path.is_file():
        return []
    statistics = read_statistics(path, answer.model.spec)
    candidates = candidates_of(answer, config, statistics)
    return [
        {
            "criterion": name,
            "routed_share_kept": _share(statistics.counts_LE, kept.values()),
            "gate_share_kept": _share(statistics.gate_sum_LE, kept.values()),
        }
        for name, kept in choices_of(answer, config, candidates).items()
    ]


def _share(sums_LE: Tensor, kept: Collection[Sequence[int]]) -> float:
    """What the kept experts of every position hold of the total."""
    total = float(sums_LE.sum())
    held = sum(float(sums_E[list(ids)].sum()) for sums_E, ids in zip(sums_LE, kept, strict=True))
    return held / total if total else 0.0


def _finished_plan(folder: Path | None, config: BuildConfig) -> dict[str, Any] | None:
    """What a finished plan says; None where there is none, or it was made for other wishes."""
    manifest = read_manifest(folder) if folder else None
    if folder is None or manifest is None:
        return None
    wishes = config.model_dump(mode="json", by_alias=True, include={"plan", "target", "export"})
    made_for = [manifest.config.get(section) or {} for section in wishes]  # without what changes no stage
    pairs = zip(wishes.values(), made_for, strict=True)
    if not all(made_for) or any(wish.get(key) != said for wish, made in pairs for key, said in made.items()):
        return None
    plan = Plan.read(folder / "plan.json")
    return plan.model_dump(mode="json", by_alias=True, exclude={"kept", "merges"})
