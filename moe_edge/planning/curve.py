"""The safe-ratio curve: what keeping fewer and fewer experts costs, and how far a model can be pruned.

Every point is the masked KL of one criterion's choice at that count, on the same few rows. The choices are nested where
the criterion ranks experts: what stays at 50 % also stays at 75 %. Beyond UNSAFE_KL_NATS a plan is refused unless it is
forced: e^2 means that the student gives the teacher's text, token by token, a seventh of the probability, and on models
from 10 M to 135 M parameters recovery by a short distillation did not come back from there.

Units: KL in nats per token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from torch import Tensor

from moe_edge.planning.masking import Kept, MaskedKl

Score = Callable[[Mapping[str, Kept], Tensor], Mapping[str, MaskedKl]]  # choices, rows -> what masking each costs
CURVE_SCHEMA = "moe-edge/curve@1"
SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375)  # of the experts
UNSAFE_KL_NATS = 2.0  # without plan.max_kl_nats, a plan beyond this needs plan.force
DOUBTFUL_KL_NATS = 1.0  # beyond this it carries a warning


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


def curve_counts(total: int, top_k: int, chosen: Sequence[int] = ()) -> list[int]:
    """The counts of a curve, most first: SHARES of all experts that leave room for top-k, and the chosen ones."""
    counts = {int(share * total + 1e-9) for share in SHARES} | set(chosen)
    return sorted((count for count in counts if top_k <= count <= total), reverse=True)


def measure_curve(
    score: Score,
    criterion: str,
    kept_at: Callable[[int], Kept],
    counts: Sequence[int],
    ids_NS: Tensor,
    *,
    experts_total: int,
    top_k: int,
) -> Curve:
    """Masked KL of `kept_at(count)` at every count.

    Args:
        score: measures named choices on rows, with the student's top-k.
        kept_at: count -> kept experts per layer.
        ids_NS: token ids.
        top_k: the student's.
    """
    results = score({str(count): kept_at(count) for count in counts}, ids_NS)
    points = [CurvePoint(count, results[str(count)].kl_nats, results[str(count)].ci95) for count in counts]
    return Curve(criterion, experts_total, top_k, ids_NS.numel(), tuple(points))
