"""The safe-ratio curve: what keeping fewer and fewer experts costs, and how far a model can be pruned.

Every point is the masked KL of one criterion's choice at that count, on the same few rows. The choices are nested where
the criterion ranks experts: what stays at 50 % also stays at 75 %. Beyond UNSAFE_KL_NATS a plan is refused unless it is
forced: e^2 means that the student gives the teacher's text, token by token, a seventh of the probability, and on models
from 10 M to 135 M parameters recovery by a short distillation did not come back from there.

The picture is the same bytes for the same numbers: matplotlib's SVG canvas is used directly, without pyplot and its global
state; ids are salted with a constant and the date is left out, so that a rebuilt plan keeps its digest.

Units: KL in nats per token.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from math import inf
from typing import Any

from torch import Tensor

from moe_edge.contracts.config import PlanConfig
from moe_edge.contracts.errors import InfeasibleError
from moe_edge.contracts.plan import KeptExperts
from moe_edge.planning.allocation import BudgetAnswer
from moe_edge.planning.notes import describe
from moe_edge.planning.scoring import MaskedKl

log = logging.getLogger(__name__)
MeasureChoices = Callable[
    [Mapping[str, KeptExperts], Tensor], Mapping[str, MaskedKl]
]  # choices, rows -> what each costs
CURVE_SCHEMA = "moe-edge/curve@1"
SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375)  # of the experts
UNSAFE_KL_NATS = 2.0  # without plan.max_kl_nats, a plan beyond this needs plan.force
DOUBTFUL_KL_NATS = 1.0  # beyond this it carries a warning
SIZE_INCHES = (6.4, 3.6)
SALT = "moe-edge"


@dataclass(frozen=True)
class CurvePoint:
    """One count of experts kept in every layer."""

    experts: int
    kl_nats: float
    kl_nats_ci95: tuple[float, float] | None  # bootstrap over rows


def _experts(point: CurvePoint) -> int:
    return point.experts


@dataclass(frozen=True)
class Curve:
    """Masked KL against experts kept, most experts first."""

    criterion: str
    experts_total: int
    top_k: int
    n_tokens: int
    points: tuple[CurvePoint, ...]

    def kl_nats(self, experts: int) -> float:
        """At any count: linear between the measured ones, infinite (unknown) outside of them."""
        above = min((point for point in self.points if point.experts >= experts), key=_experts, default=None)
        below = max((point for point in self.points if point.experts <= experts), key=_experts, default=None)
        if above is None or below is None:
            return inf
        if above.experts == below.experts:
            return above.kl_nats
        share = (experts - below.experts) / (above.experts - below.experts)
        return below.kl_nats + share * (above.kl_nats - below.kl_nats)

    def fewest_within(self, limit_nats: float) -> int | None:
        """The fewest experts such that this and every larger measured count stay within a limit; None if none does."""
        safe = None
        for point in sorted(self.points, key=_experts, reverse=True):
            if point.kl_nats > limit_nats:
                break
            safe = point.experts
        return safe

    def to_json(self, limit_nats: float) -> dict[str, Any]:
        """For curve.json and the report."""
        return {
            "schema": CURVE_SCHEMA,
            "criterion": self.criterion,
            "experts_total": self.experts_total,
            "top_k": self.top_k,
            "n_tokens": self.n_tokens,
            "limit_nats": limit_nats,
            "fewest_safe_experts": self.fewest_within(limit_nats),
            "points": [
                {
                    "experts": point.experts,
                    "share": point.experts / self.experts_total,
                    "kl_nats": point.kl_nats,
                    "kl_nats_ci95": point.kl_nats_ci95,
                }
                for point in self.points
            ],
        }

    @property
    def in_words(self) -> str:
        """'16: 0.000, 14: 0.071, ...'."""
        return ", ".join(f"{point.experts}: {point.kl_nats:.3f}" for point in self.points)


def curve_counts(total: int, top_k: int, chosen: Sequence[int] = ()) -> list[int]:
    """The counts of a curve, most first: SHARES of all experts that leave room for top-k, and the chosen ones."""
    counts = {int(share * total + 1e-9) for share in SHARES} | set(chosen)
    return sorted((count for count in counts if top_k <= count <= total), reverse=True)


def measure_curve(
    measure: MeasureChoices,
    criterion: str,
    kept_at: Callable[[int], KeptExperts],
    counts: Sequence[int],
    ids_NS: Tensor,
    *,
    experts_total: int,
    top_k: int,
) -> Curve:
    """Masked KL of `kept_at(count)` at every count.

    Args:
        measure: masked KL of named choices on rows, with the student's top-k and neurons.
        kept_at: count -> kept experts per layer.
        ids_NS: token ids [N rows, S tokens].
        top_k: the student's.
    """
    results = measure({str(count): kept_at(count) for count in counts}, ids_NS)
    points = [CurvePoint(count, results[str(count)].kl_nats, results[str(count)].ci95) for count in counts]
    return Curve(criterion, experts_total, top_k, ids_NS.numel(), tuple(points))


def limit_nats(settings: PlanConfig) -> float:
    """The masked KL beyond which a plan is refused: plan.max_kl_nats, or what is unsafe for any model."""
    return UNSAFE_KL_NATS if settings.max_kl_nats is None else settings.max_kl_nats


def check_safe(
    answer: BudgetAnswer, kl_nats: float, curve: Curve | None, settings: PlanConfig, detail: str
) -> list[str]:
    """What to say about a choice whose masked KL is `kl_nats`; nothing where it is harmless.

    Args:
        curve: by experts kept; None where all of them are, and only top-k or width fell.
        detail: the masked KL of the other criteria, in words.

    Raises:
        InfeasibleError: it is beyond the limit, and plan.force is not set.
    """
    limit, chosen = limit_nats(settings), describe(answer.choice, answer.model)
    if kl_nats > limit and not settings.force:
        safe = curve.fewest_within(limit) if curve else None
        keep = f"--set plan.experts={safe}" if safe else "a target with more memory"
        if answer.space.changes_shape and not safe:
            keep = "--set plan.top_k=keep --set plan.expert_width=keep"
        raise InfeasibleError(
            f"{chosen} loses {kl_nats:.3f} nats per token, the limit is {limit:g}",
            where="plan.max_kl_nats" + ("" if settings.max_kl_nats is not None else " (not set: the safe limit)"),
            why=f"masked KL before recovery: {detail}" + (f". By experts kept: {curve.in_words}" if curve else ""),
            next_command=f"{keep}, or --set plan.force=true",
        )
    if kl_nats > limit:
        return [f"Forced: {chosen} loses {kl_nats:.3f} nats per token before recovery, the limit is {limit:g}."]
    if kl_nats > DOUBTFUL_KL_NATS:
        where = f" ({curve.in_words})" if curve else ""
        text = f"Doubtful: {chosen} loses {kl_nats:.3f} nats per token before recovery{where}."
        log.warning("%s", text)
        return [text]
    return []


def curve_svg(curve: Curve, limit_nats: float, chosen: int | None = None) -> str:
    """The curve with the limit and, where given, the chosen count as a marked point."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": SALT, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=SIZE_INCHES, layout="tight")
        axes = figure.add_subplot()
        experts = [point.experts for point in curve.points]
        axes.plot(experts, [point.kl_nats for point in curve.points], "o-", color="#1f5fa8")
        for point in curve.points:
            if point.kl_nats_ci95:
                axes.vlines(point.experts, *point.kl_nats_ci95, color="#1f5fa8", alpha=0.5)
        highest = max(point.kl_nats for point in curve.points)
        for nats, style, text in ((DOUBTFUL_KL_NATS, ":", "doubtful"), (limit_nats, "--", "limit")):
            if nats <= 2 * highest:  # a line far above would flatten the curve
                axes.axhline(nats, linestyle=style, color="#7f7f7f", label=f"{text}: {nats:g} nats")
        if chosen is not None:
            axes.plot([chosen], [curve.kl_nats(chosen)], "D", color="#c0392b", label=f"chosen: {chosen}", zorder=3)
        axes.set_xlabel(f"experts kept per layer, of {curve.experts_total} (top-{curve.top_k})")
        axes.set_ylabel("masked KL, nats per token")
        axes.set_title(f"Keeping fewer experts, chosen by {curve.criterion}, before recovery")
        axes.set_xlim(max(experts) + 0.5, min(experts) - 0.5)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
        stream = StringIO()
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(stream, metadata={"Date": None, "Creator": None})
    return stream.getvalue()
