"""Top-k and expert width set to `auto`: every shape that the budget admits is measured, and the least KL wins.

Each shape gets its own count of experts and bits, as if it had been asked for; what it costs is the KL of the best
criterion's choice with that top-k and those neurons, plus the bits. On a tie the least change stays.

The KL is that of the refitted student where it can be tried: the plan is applied to a copy of the teacher and judged against
it, which takes room for a second copy and the time of `compress`. Masking alone does not see what the refit wins back, and
that differs between shapes: on the 134.8 M benchmark model it turned .494 nats of dropped experts into .116, and .342 nats of
silent neurons into .286. So where a plan refits and that cannot be tried, narrower experts must win by REFIT_EDGE.

Units: KL in nats per token.
Shape suffixes: N rows, S tokens of a row.
"""

import copy
import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.compression.layers import Material
from moe_edge.compression.surgery import apply_plan
from moe_edge.contracts.plan import Plan, TriedShape
from moe_edge.planning.allocation import BudgetAnswer
from moe_edge.planning.bits import Sensitivity
from moe_edge.planning.decision import bits_are_free, decide, quantization_of
from moe_edge.planning.document import KEEP_ALL, PlanInputs, finish_plan, make_plan
from moe_edge.planning.judging import CandidateJudge, with_fewer_experts
from moe_edge.planning.scoring import MaskedKl, batches_of, first_rows, logits_of, row_kl, summarise
from moe_edge.process.placement import fits_in_memory

log = logging.getLogger(__name__)
REFIT_EDGE = 2.0  # what a masked KL with silent neurons is multiplied with before it is compared
TRIAL_TOKENS = 4096  # a comparison needs no more, and every shape takes as long as `compress`
TRIED_ACTIONS = ("drop", "merge")  # the others are fitted for minutes per layer, and need training in any case


def choose_shape(
    judge: CandidateJudge, inputs: PlanInputs, answer: BudgetAnswer
) -> tuple[BudgetAnswer, list[TriedShape]]:
    """Try every shape at which the budgets hold.

    Args:
        answer: from headers alone, with those at the other shapes.

    Returns:
        (the answer from headers alone at the shape with the least predicted KL, all shapes from the best on).
    """
    answers, config = answer.all_shapes, judge.config
    criterion = _criterion_to_compare_by(judge, answers)
    sensitivity = judge.sensitivity if any(bits_are_free(one, config) for one in answers) else None
    tried = [(one, _try_shape(judge, inputs, one, criterion, sensitivity)) for one in answers]
    refits = config.plan.compensate is not False and judge.scorer.model is not None
    tried.sort(key=lambda pair: compared_nats(pair[1], refits))
    best = tried[0][0]
    log.info("plan: top-%d of %d shapes", best.space.top_k, len(tried))
    return best, [shape for _, shape in tried]


def compared_nats(tried: TriedShape, refits: bool) -> float:
    """What shapes are ranked by: the predicted KL, that of silent neurons with REFIT_EDGE where a refit was not tried."""
    untried = refits and tried.refitted_kl_nats is None
    edge = REFIT_EDGE if untried and tried.expert_width is not None else 1.0
    return tried.kl_nats + (edge - 1) * tried.masked_kl_nats


def _criterion_to_compare_by(judge: CandidateJudge, answers: tuple[BudgetAnswer, ...]) -> str:
    """The best one where the first shape that drops experts, or may, does so; KEEP_ALL where none does."""
    pruning = next((answer for answer in answers if not answer.keeps_all), None)
    if pruning is None:
        free = (answer for answer in answers if bits_are_free(answer, judge.config))
        pruning = next(map(with_fewer_experts, free), None)
    return KEEP_ALL if pruning is None else judge.compare(pruning, searching=False).best_criterion


def _try_shape(
    judge: CandidateJudge, inputs: PlanInputs, answer: BudgetAnswer, criterion: str, sensitivity: Sensitivity | None
) -> TriedShape:
    """What one shape costs with its best count of experts and bits."""
    free = bits_are_free(answer, judge.config)
    curve = judge.curve(answer, criterion, only_the_choice=not free)
    if free:
        answer, quantization = decide(answer, curve, sensitivity)
    else:
        quantization = quantization_of(answer, sensitivity)
    choice = answer.choice
    kept = judge.kept(answer, criterion, choice.experts)
    plan = finish_plan(make_plan(answer, criterion, kept, {}, (), quantization), answer, inputs)
    rows_NS = first_rows(judge.rows.judging_NS, judge.config.plan.curve_tokens)
    refitted = refitted_kl(plan, judge.scorer.model, inputs, rows_NS)
    masked, bits = curve.kl_nats(choice.experts), quantization.nats.get(choice.packing.label, 0.0)
    return TriedShape(
        top_k=answer.space.top_k,
        expert_width=answer.space.width,
        experts_kept=choice.experts,
        quantization=choice.packing.label,
        masked_kl_nats=masked,
        refitted_kl_nats=refitted and refitted.kl_nats,
        quantization_kl_nats=bits,
        kl_nats=(refitted.kl_nats if refitted else masked) + bits,
        file_bytes=choice.estimate.file_bytes,
        decode_tokens_per_s=choice.estimate.decode_tokens_per_s,
    )


def refitted_kl(plan: Plan, model: PreTrainedModel | None, inputs: PlanInputs, ids_NS: Tensor) -> MaskedKl | None:
    """What the student of a finished plan loses before training; None where nothing is refitted, or without room.

    Args:
        model: the teacher in memory; None where it is streamed.
        ids_NS: rows to judge on.
    """
    if model is None or not plan.compensate or plan.action not in TRIED_ACTIONS:
        return None
    if not fits_in_memory(inputs.headers, model.dtype, model.device):
        return None
    width = "" if plan.expert_width is None else f" of {plan.expert_width} neurons"
    log.info("plan: trying the refit of %d experts%s, top-%d", plan.experts_kept, width, plan.top_k)
    fewer = plan.model_copy(update={"action_tokens": min(plan.action_tokens, TRIAL_TOKENS)})
    return student_kl(model, fewer, inputs.material(), ids_NS)


@torch.no_grad()
def student_kl(model: PreTrainedModel, plan: Plan, material: Material, ids_NS: Tensor) -> MaskedKl:
    """KL(teacher || the student that `compress` would write), nats per token; the teacher stays as it is.

    Args:
        material: what the plan is fitted on.
        ids_NS: rows to judge on; those that the plan is fitted on would flatter it.

    Raises:
        As `surgery.apply_plan`.
    """
    student = apply_plan(copy.deepcopy(model), plan, material).model
    batches = batches_of(model, ids_NS)
    kl_N = torch.cat([row_kl(logits_of(model, batch_NS), logits_of(student, batch_NS)) for batch_NS in batches])
    return summarise(kl_N, ids_NS.numel())
