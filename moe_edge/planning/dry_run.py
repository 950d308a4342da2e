"""A dry run: what fits, what it costs and why, without a weight.

Expected KLs are priors here; a finished plan of the same wishes has the measured ones, and is shown beside them.

Shape suffixes: L MoE layers, E experts.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_edge.contracts.checkpoint import Checkpoint, CheckpointHeaders
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.config_io import value_at
from moe_edge.contracts.manifest import read_manifest
from moe_edge.contracts.plan import Plan
from moe_edge.contracts.spec import keepable_counts
from moe_edge.contracts.target import Target
from moe_edge.models.students import describe_model
from moe_edge.planning.allocation import BudgetAnswer, header_plan
from moe_edge.planning.candidates import read_statistics
from moe_edge.planning.decision import decide_by_priors, quantization_of
from moe_edge.planning.document import make_plan
from moe_edge.planning.judging import candidates_of, choices_of
from moe_edge.planning.options import Option, options_grid


@dataclass(frozen=True)
class CriterionShares:
    """How much of the teacher's routing the experts carried that a criterion would keep."""

    criterion: str
    routed_share_kept: float
    gate_share_kept: float


@dataclass(frozen=True)
class PlanPreview:
    """What fits, what it costs and why, from headers alone, and what a profile or a finished plan tells."""

    plan: Plan  # which experts stay (`kept`) is decided by a profile; expected losses are priors
    headers: CheckpointHeaders
    target: Target
    answer: BudgetAnswer
    shapes: tuple[Option, ...] = ()  # the choice at every top-k and width, where those are free
    criteria: tuple[CriterionShares, ...] = ()  # where there is a profile
    measured: Plan | None = None  # the finished plan of the same wishes

    def to_dict(self) -> dict[str, Any]:
        """JSON-able {teacher, target, budget, choice, competitor, options, shapes, criteria, notes, measured}; sizes in
        bytes."""
        plan, spec = self.plan, self.answer.model.spec
        packing = self.answer.choice.packing
        measured = self.measured
        return {
            "teacher": describe_model(self.headers),
            "target": self.target.name,
            "budget": self.target.budget.model_dump(mode="json", exclude_none=True),
            "choice": {
                "experts_kept": plan.experts_kept,
                "experts_total": plan.experts_total,
                "top_k": plan.top_k,
                "expert_width": plan.expert_width,
                "quantization": packing.label if packing.format == "gguf" else plan.quantization,
                "onnx_precision": plan.onnx_precision,
                "estimate": plan.estimate.model_dump(mode="json"),
                "largest_contexts": plan.largest_contexts,
                "context_limit": spec.context_length,
            },
            "competitor": plan.competitor,
            "options": [option.row() for option in shown_options(self.answer)],
            "shapes": [option.row() for option in self.shapes],
            "criteria": [asdict(one) for one in self.criteria],
            "notes": plan.notes,
            "measured": measured and measured.model_dump(mode="json", by_alias=True, exclude={"kept", "merges"}),
        }


def preview_plan(
    teacher: Checkpoint, config: BuildConfig, profile: Path | None = None, finished: Path | None = None
) -> PlanPreview:
    """The plan as far as headers tell.

    Args:
        profile: the folder of a finished profile.
        finished: the folder of a finished plan of this teacher.

    Raises:
        As `header_plan`.
    """
    solved = header_plan(teacher.headers, config)
    answer = decide_by_priors(solved, config)
    plan = make_plan(answer, config.plan.criterion, {}, {}, [], quantization_of(answer))
    plan = plan.model_copy(update={"action": config.plan.action})
    shares = tuple(_shares_by_criterion(answer, config, profile))
    shapes = tuple(one.choice for one in solved.all_shapes) if solved.others else ()
    measured = _finished_plan(finished, config)
    return PlanPreview(plan, teacher.headers, config.target, answer, shapes, shares, measured)


def shown_options(answer: BudgetAnswer) -> list[Option]:
    """The table: a few expert counts times the usual types."""
    total, demand = answer.model.spec.moe.experts, answer.demand
    counts = {total, total * 3 // 4, total * 5 // 8, total // 2, demand.counts[0], answer.choice.experts}
    packings = list(dict.fromkeys([*demand.preferred, *demand.smaller]))
    shown = [packing for packing in packings if packing.name not in ("F32", "F16")] or packings
    return options_grid(answer.space, counts & set(keepable_counts(answer.model.spec, demand.top_k)), shown)


def _shares_by_criterion(answer: BudgetAnswer, config: BuildConfig, profile: Path | None) -> Iterator[CriterionShares]:
    """Per criterion; needs no model."""
    path = None if profile is None else profile / "statistics.safetensors"
    if path is None or answer.keeps_all or not path.is_file():
        return
    statistics = read_statistics(path, answer.model.spec)
    candidates = candidates_of(answer, config, statistics)
    for name, kept in choices_of(answer, config, candidates).items():
        sums = (statistics.counts_LE, statistics.gate_sum_LE)
        yield CriterionShares(name, *(_share(sums_LE, kept.values()) for sums_LE in sums))


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
    return Plan.read(folder / "plan.json")
