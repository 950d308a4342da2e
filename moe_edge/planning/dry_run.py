"""A dry run: what fits, what it costs and why, without a weight.

Expected KLs are priors here; a finished plan of the same wishes has the measured ones, and is shown beside them.

Shape suffixes: L MoE layers, E experts.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from moe_edge.contracts.artifacts import PlanFolder, ProfileFolder
from moe_edge.contracts.checkpoint import Checkpoint
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.config_io import value_at
from moe_edge.contracts.manifest import read_manifest
from moe_edge.contracts.measurements import ModelInfo
from moe_edge.contracts.plan import Plan
from moe_edge.contracts.preview import PlanPreview, PreviewedChoice, PreviewedCriterion, PreviewedOption
from moe_edge.contracts.spec import keepable_counts
from moe_edge.models.students import describe_model
from moe_edge.planning.allocation import BudgetAnswer, header_plan
from moe_edge.planning.candidates import read_statistics
from moe_edge.planning.decision import decide_by_priors, quantization_of
from moe_edge.planning.document import make_plan
from moe_edge.planning.judging import candidates_of, choices_of
from moe_edge.planning.options import Option, largest_contexts, options_grid


def plan_from_headers(teacher: Checkpoint, config: BuildConfig) -> Plan:
    """The plan as far as headers tell. Which experts stay (`kept`) is decided by a profile; expected losses are priors.

    Raises:
        As `header_plan`.
    """
    answer = decide_by_priors(header_plan(teacher.headers, config), config)
    plan = make_plan(answer, config.plan.criterion, {}, {}, [], quantization_of(answer))
    return plan.model_copy(update={"action": config.plan.action})


def preview_plan(
    teacher: Checkpoint, config: BuildConfig, profile: Path | None = None, finished: Path | None = None
) -> PlanPreview:
    """What fits, what it costs and why, from headers alone, and what a profile or a finished plan tells.

    Args:
        profile: the folder of a finished profile.
        finished: the folder of a finished plan of this teacher.

    Raises:
        As `header_plan`.
    """
    solved = header_plan(teacher.headers, config)
    answer = decide_by_priors(solved, config)
    choice, space = answer.choice, answer.space
    return PlanPreview(
        teacher=ModelInfo.model_validate(describe_model(teacher.headers)),
        target=config.target.name,
        budget=config.target.budget.model_dump(mode="json", exclude_none=True),
        choice=PreviewedChoice(
            experts_kept=choice.experts,
            experts_total=teacher.spec.moe.experts,
            top_k=space.top_k,
            expert_width=space.width,
            quantization=choice.packing.label if choice.packing.format == "gguf" else answer.quantization,
            onnx_precision=answer.onnx_precision,
            estimate=choice.estimate,
            largest_contexts=largest_contexts(space, choice),
            context_limit=teacher.spec.context_length,
        ),
        competitor=answer.competitor,
        options=[_row(option) for option in shown_options(answer)],
        shapes=[_row(one.choice) for one in solved.all_shapes] if solved.others else [],
        criteria=list(_shares_by_criterion(answer, config, profile)),
        notes=list(answer.notes),
        measured=_finished_plan(finished, config),
    )


def _row(option: Option) -> PreviewedOption:
    return PreviewedOption.model_validate(option.row())


def shown_options(answer: BudgetAnswer) -> list[Option]:
    """The table: a few expert counts times the usual types."""
    total, demand = answer.model.spec.moe.experts, answer.demand
    counts = {total, total * 3 // 4, total * 5 // 8, total // 2, demand.counts[0], answer.choice.experts}
    packings = list(dict.fromkeys([*demand.preferred, *demand.smaller]))
    shown = [packing for packing in packings if packing.name not in ("F32", "F16")] or packings
    return options_grid(answer.space, counts & set(keepable_counts(answer.model.spec, demand.top_k)), shown)


def _shares_by_criterion(
    answer: BudgetAnswer, config: BuildConfig, profile: Path | None
) -> Iterator[PreviewedCriterion]:
    """Per criterion; needs no model."""
    path = None if profile is None else profile / ProfileFolder.STATISTICS
    if path is None or answer.keeps_all or not path.is_file():
        return
    statistics = read_statistics(path, answer.model.spec)
    candidates = candidates_of(answer, config, statistics)
    for name, kept in choices_of(answer, config, candidates).items():
        routed, gates = (_share(sums_LE, kept.values()) for sums_LE in (statistics.counts_LE, statistics.gate_sum_LE))
        yield PreviewedCriterion(criterion=name, routed_share_kept=routed, gate_share_kept=gates)


def _share(sums_LE: Tensor, kept: Collection[Sequence[int]]) -> float:
    """What the kept experts of every position hold of the total."""
    total = float(sums_LE.sum())
    held = sum(float(sums_E[list(ids)].sum()) for sums_E, ids in zip(sums_LE, kept, strict=True))
    return held / total if total else 0.0


def _finished_plan(folder: Path | None, config: BuildConfig) -> Plan | None:
    """What a finished plan says; None where there is none, or it was made for other wishes."""
    manifest = read_manifest(folder) if folder else None
    if folder is None or manifest is None:
        return None
    wishes = config.model_dump(mode="json", by_alias=True)
    if not manifest.config or any(value_at(wishes, key) != value for key, value in manifest.config.items()):
        return None
    return PlanFolder.of(folder, manifest).plan
