"""The whole plan, top down: from the headers' answer to the budget over measured candidates to a finished document.

If experts must go, every criterion's choice is improved on by a search over some calibration rows, and all of them are
masked in the teacher on other rows, where the least KL wins; `random` is always beside them, because on some models no
criterion beats it. The KL of the winner is the build's prediction.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from moe_edge.contracts.plan import Plan, TriedShape
from moe_edge.planning.allocation import BudgetAnswer
from moe_edge.planning.candidates import criteria_to_compare
from moe_edge.planning.curve import Curve, CurvePoint, check_safe
from moe_edge.planning.decision import QuantizationCost, bits_are_free, decide, quantization_of, settle
from moe_edge.planning.document import KEEP_ALL, PlanInputs, finish_plan, make_plan
from moe_edge.planning.judging import (
    CandidateJudge,
    candidates_of,
    random_choice_notes,
    with_fewer_experts,
)
from moe_edge.planning.scoring import Scorer
from moe_edge.planning.shape_trials import choose_shape

NOTHING_TO_MEASURE = "Every expert is kept, so there is no masked KL to measure and no criterion to choose."
SaveCurve = Callable[[Curve, int], None]  # (the curve, experts kept by the decision)


def plan_student(
    answer: BudgetAnswer,
    inputs: PlanInputs,
    open_scorer: Callable[[], AbstractContextManager[Scorer]],
    save_curve: SaveCurve,
) -> Plan:
    """The finished plan.

    Args:
        answer: the budget's, solved from headers alone (`allocation.header_plan`).
        open_scorer: the teacher; only opened where something must be measured.
        save_curve: called with the safe-ratio curve where one is measured, also where the plan is then refused as unsafe.

    Raises:
        InfeasibleError: the masked KL exceeds plan.max_kl_nats.
        ConfigError, InputRejected: a profile that has not what the plan needs, or that belongs to another teacher.
    """
    config = inputs.config
    if not any(one.needs_measuring for one in answer.all_shapes):
        quantization = quantization_of(answer)
        plan = make_plan(answer, KEEP_ALL, answer.all_experts, {}, [NOTHING_TO_MEASURE], quantization)
        return finish_plan(plan, answer, inputs)
    rows = inputs.rows()
    candidates = candidates_of(answer, config, inputs.statistics())
    criteria_to_compare(config.plan.criterion, candidates.stats)  # refuses before the teacher is loaded
    shapes: list[TriedShape] = []
    with open_scorer() as scorer:
        judge = CandidateJudge(config, candidates, scorer, rows)
        if answer.others:
            answer, shapes = choose_shape(judge, inputs, answer)
        if answer.keeps_all and len(answer.demand.counts) == 1 and bits_are_free(answer, config):
            plan = _plan_without_pruning(judge, *decide(answer, _nothing_dropped(answer), judge.sensitivity))
        elif answer.keeps_all and not bits_are_free(answer, config):
            plan = _plan_without_pruning(judge, answer, quantization_of(answer))
        else:
            plan = _plan_by_measuring(judge, answer, save_curve)
    return finish_plan(plan, answer, inputs).model_copy(update={"shapes": shapes})


def _nothing_dropped(answer: BudgetAnswer) -> Curve:
    """The curve where no other count may be chosen, so that nothing needs masking."""
    total = answer.choice.experts
    return Curve(KEEP_ALL, total, answer.space.top_k, 0, (CurvePoint(total, 0.0, None),))


def _plan_without_pruning(judge: CandidateJudge, answer: BudgetAnswer, quantization: QuantizationCost) -> Plan:
    """Every expert stays; a lower top-k or narrower experts alone are measured."""
    kept, notes = answer.all_experts, [judge.rows.note]
    if not answer.alters:
        return make_plan(answer, KEEP_ALL, kept, {}, notes, quantization)
    results = judge.masked_kl(answer, {KEEP_ALL: kept}, judge.rows.judging_NS)
    nats = results[KEEP_ALL].kl_nats
    notes += check_safe(answer, nats, None, judge.config.plan, f"{KEEP_ALL} {nats:.3f}")
    return make_plan(answer, KEEP_ALL, kept, results, notes, quantization)


def _plan_by_measuring(judge: CandidateJudge, answer: BudgetAnswer, save_curve: SaveCurve) -> Plan:
    """Judge the candidates, decide how many experts stay and in which bits, and say what must be said."""
    config = judge.config
    free = bits_are_free(answer, config)
    compared = with_fewer_experts(answer)
    comparison = judge.compare(compared, searching=not free)  # where bits are free the count may change: no search yet
    curve = judge.curve(answer, comparison.best_criterion)
    if free:
        decided, quantization = decide(answer, curve, judge.sensitivity)
    else:  # the competitor may win now that the masked KL is known
        decided, quantization = settle(answer, comparison.best_nats), quantization_of(answer)
    save_curve(curve, decided.choice.experts)
    if decided.keeps_all and decided.alters:
        return _plan_without_pruning(judge, decided, quantization)
    if decided.keeps_all:
        notes = [*comparison.notes, f"The candidates' masked KL is that of keeping {compared.choice.experts} experts."]
        return make_plan(decided, KEEP_ALL, decided.all_experts, comparison.results, notes, quantization)
    if free:
        comparison = judge.compare(decided, searching=True)
    best, table = comparison.best, ", ".join(f"{name} {kl:.3f}" for name, kl in comparison.ranked)
    notes = [
        *comparison.notes,
        *check_safe(decided, comparison.best_nats, curve, config.plan, table),
        *random_choice_notes(best, comparison.results),
        *judge.even_layers_note(decided, comparison),
    ]
    return make_plan(decided, best, comparison.choices[best], comparison.results, notes, quantization)
