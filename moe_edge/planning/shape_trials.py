"""Top-k and expert width set to `auto`: every shape that the budget admits is measured, and the least KL wins.

Each shape gets its own count of experts and bits, as if it had been asked for; what it costs is the KL of the best
criterion's choice with that top-k and those neurons, plus the bits. On a tie the least change stays.

The KL is that of the refitted student where it can be tried (plan_preview.py). Masking alone does not see the refit, which
can recover more of dropped experts than of silent neurons (refitted.py has an example); so where a plan refits and that
cannot be tried, narrower experts must win by REFIT_EDGE.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

from moe_edge.contracts.plan import TriedShape
from moe_edge.planning.allocation import Feasible
from moe_edge.planning.bits import Sensitivity
from moe_edge.planning.candidates import Kept
from moe_edge.planning.curve import measure_curve
from moe_edge.planning.decision import bits_are_free, decide, quantization_of
from moe_edge.planning.judging import Desk, thinner
from moe_edge.planning.measured_budget import counts_of, first_rows, sensitivity_of
from moe_edge.planning.preview import KEEP_ALL, Preview, all_experts, make_plan

log = logging.getLogger(__name__)
REFIT_EDGE = 2.0  # what a masked KL with silent neurons is multiplied with before it is compared


class _Weighed(NamedTuple):
    answer: Feasible
    tried: TriedShape


def settle_shape(
    desk: Desk, preview: Preview, feasible: Feasible
) -> tuple[Feasible, list[TriedShape], Sensitivity | None]:
    """The answer at the shape with the least predicted KL.

    Args:
        feasible: the answer from headers alone, with those at the other shapes.

    Returns:
        (the answer, all shapes from the best on, what the bits cost where it was measured on the way).
    """
    answers = [feasible, *feasible.others]
    criterion, kept_at = _ranking(desk, answers)
    sensitivity = None
    if any(bits_are_free(answer, desk.config) for answer in answers):
        sensitivity = sensitivity_of(desk.config, desk.teacher.model, desk.rows.judged_NS, desk.chosen.stats.imatrix)
    weighed = [_weigh(desk, preview, answer, criterion, kept_at, sensitivity) for answer in answers]
    refits = desk.config.plan.compensate is not False and desk.teacher.model is not None
    weighed.sort(key=lambda one: compared_nats(one.tried, refits))
    best = weighed[0]
    log.info("plan: top-%d of %d shapes", best.answer.space.top_k, len(weighed))
    return best.answer, [one.tried for one in weighed], sensitivity


def compared_nats(tried: TriedShape, refits: bool) -> float:
    """What shapes are ranked by: the predicted KL, that of silent neurons with REFIT_EDGE where a refit was not tried."""
    untried = refits and tried.refitted_kl_nats is None
    edge = REFIT_EDGE if untried and tried.expert_width is not None else 1.0
    return tried.kl_nats + (edge - 1) * tried.masked_kl_nats


def _ranking(desk: Desk, answers: list[Feasible]) -> tuple[str, Callable[[int], Kept]]:
    """The criterion by which all shapes are compared: the best one where the first shape drops experts, or may."""
    pruning = next((answer for answer in answers if not answer.keeps_all), None)
    free = next((thinner(answer) for answer in answers if bits_are_free(answer, desk.config)), None)
    pruning = pruning or free
    if pruning is None:
        return KEEP_ALL, lambda _count: all_experts(answers[0])
    name = desk.judge(pruning, searching=False).ranking
    return name, lambda count: desk.chosen.kept(name, count)


def _weigh(
    desk: Desk,
    preview: Preview,
    answer: Feasible,
    criterion: str,
    kept_at: Callable[[int], Kept],
    sensitivity: Sensitivity | None,
) -> _Weighed:
    """What one shape costs with its best count of experts and bits."""
    spec, free = answer.model.spec, bits_are_free(answer, desk.config)
    rows_NS = first_rows(desk.rows.judged_NS, desk.config.plan.curve_tokens)
    curve = measure_curve(
        desk.score(answer), criterion, kept_at, counts_of(answer) if free else [answer.choice.experts], rows_NS,
        experts_total=spec.moe.experts, top_k=answer.space.top_k,
    )  # fmt: skip
    settled, quantization = (
        decide(answer, curve, sensitivity) if free else (answer, quantization_of(answer, sensitivity))
    )
    choice = settled.choice
    plan = make_plan(settled, criterion, kept_at(choice.experts), {}, (), quantization)
    refitted = preview.kl(preview.finish(plan, settled), desk.teacher.model, rows_NS)
    masked, bits = curve.kl_nats(choice.experts), quantization.nats.get(choice.packing.label, 0.0)
    tried = TriedShape(
        top_k=answer.space.top_k, expert_width=answer.space.width, experts_kept=choice.experts,
        quantization=choice.packing.label, masked_kl_nats=masked, refitted_kl_nats=refitted and refitted.kl_nats,
        quantization_kl_nats=bits, kl_nats=(refitted.kl_nats if refitted else masked) + bits,
        file_bytes=choice.estimate.file_bytes, decode_tokens_per_s=choice.estimate.decode_tokens_per_s,
    )  # fmt: skip
    return _Weighed(answer, tried)
