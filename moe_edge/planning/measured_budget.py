"""The measured part of the budget: the safe-ratio curve, the quantization's sensitivity, and what follows from them.

Called by stages/plan.py once a criterion has been chosen. Writes curve.json and curve.svg beside plan.json.

Shape suffixes: N rows of tokens, S tokens of a row.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.contracts.config import BuildConfig, PlanConfig
from moe_edge.contracts.errors import InfeasibleError
from moe_edge.contracts.spec import keepable_counts
from moe_edge.planning.allocation import Feasible
from moe_edge.planning.bits import Sensitivity
from moe_edge.planning.curve import DOUBTFUL_KL_NATS, UNSAFE_KL_NATS, Curve, Score, curve_counts, measure_curve
from moe_edge.planning.curve_plot import curve_svg
from moe_edge.planning.decision import Quantization, bits_are_free, decide, quantization_of
from moe_edge.planning.masking import Kept
from moe_edge.planning.notes import describe
from moe_edge.planning.sensitivity import measure_sensitivity
from moe_edge.storage.files import write_json_atomic, write_text_atomic

log = logging.getLogger(__name__)
CURVE_JSON, CURVE_SVG = "curve.json", "curve.svg"


@dataclass(frozen=True)
class Measured:
    """The budget's answer with measured numbers."""

    feasible: Feasible
    quantization: Quantization
    curve: Curve
    free: bool  # were the bits of every class free, so that `feasible` is the decision itself?


def measure_budget(
    feasible: Feasible,
    config: BuildConfig,
    score: Score,
    model: PreTrainedModel | None,
    ids_NS: Tensor,
    imatrix: Mapping[str, Tensor] | None,
    criterion: str,
    kept_at: Callable[[int], Kept],
    known: Sensitivity | None = None,
) -> Measured:
    """Measure the curve, and the sensitivity where bits are free, and decide.

    Args:
        feasible: the answer from headers alone.
        score: masked KL of named choices on rows, with the student's top-k and neurons.
        model: the teacher, to quantize; None where it does not fit in memory, and then priors decide.
        ids_NS: calibration rows, of which the first few are used (plan.curve_tokens, plan.sensitivity_tokens).
        imatrix: the profile's sums of squares.
        criterion: its name, for the curve.
        kept_at: count -> the criterion's kept experts.
        known: the sensitivity, where it has been measured already.
    """
    spec, settings = feasible.model.spec, config.plan
    curve = measure_curve(
        score, criterion, kept_at, counts_of(feasible), first_rows(ids_NS, settings.curve_tokens),
        experts_total=spec.moe.experts, top_k=feasible.space.top_k,
    )  # fmt: skip
    if not bits_are_free(feasible, config):
        return Measured(feasible, quantization_of(feasible), curve, False)
    return Measured(*decide(feasible, curve, known or sensitivity_of(config, model, ids_NS, imatrix)), curve, True)


def sensitivity_of(
    config: BuildConfig, model: PreTrainedModel | None, ids_NS: Tensor, imatrix: Mapping[str, Tensor] | None
) -> Sensitivity | None:
    """Measured on the teacher; None where that is switched off or the teacher does not fit in memory: priors then."""
    tokens = config.plan.sensitivity_tokens
    if not tokens or model is None:
        return None
    return measure_sensitivity(model, first_rows(ids_NS, tokens), imatrix, codebooks=codebooks_suit(config))


def codebooks_suit(config: BuildConfig) -> bool:
    """May the experts get codebook types: is their importance the student's, and does nobody demand a speed of a CPU?

    The roofline does not know that a CPU is slower with them: experts in IQ2_S decoded at half the speed of Q2_K, in
    IQ3_XXS and IQ4_XS at three quarters of Q3_K and Q4_K (one x86 core, 100 M parameters).
    """
    on_cpu = config.target.runtime.gpu_layers == 0
    return config.plan.action in ("drop", "merge") and not (on_cpu and config.target.budget.decode_tokens_per_s)


def counts_of(feasible: Feasible) -> list[int]:
    """The usual shares and the choice, where every layer and group can keep that many."""
    spec, top_k = feasible.model.spec, feasible.space.top_k
    possible = keepable_counts(spec, top_k)
    return [count for count in curve_counts(spec.moe.experts, top_k, [feasible.choice.experts]) if count in possible]


def first_rows(ids_NS: Tensor, tokens: int) -> Tensor:
    """The first rows that hold about `tokens` tokens, at least one."""
    return ids_NS[: max(1, tokens // ids_NS.shape[1])]


def write_curve(out: Path, curve: Curve, settings: PlanConfig, chosen: int) -> None:
    """curve.json and curve.svg in the plan's folder."""
    write_json_atomic(out / CURVE_JSON, curve.to_json(limit_nats(settings)))
    write_text_atomic(out / CURVE_SVG, curve_svg(curve, limit_nats(settings), chosen))


def limit_nats(settings: PlanConfig) -> float:
    """The masked KL beyond which a plan is refused: plan.max_kl_nats, or what is unsafe for any model."""
    return UNSAFE_KL_NATS if settings.max_kl_nats is None else settings.max_kl_nats


def check_safe(feasible: Feasible, kl_nats: float, curve: Curve | None, settings: PlanConfig, detail: str) -> list[str]:
    """What to say about a choice whose masked KL is `kl_nats`; nothing where it is harmless.

    Args:
        curve: by experts kept; None where all of them are, and only top-k or width fell.
        detail: the masked KL of the other criteria, in words.

    Raises:
        InfeasibleError: it is beyond the limit, and plan.force is not set.
    """
    limit, chosen = limit_nats(settings), describe(feasible.choice, feasible.model)
    if kl_nats > limit and not settings.force:
        safe = curve.fewest_within(limit) if curve else None
        keep = f"--set plan.experts={safe}" if safe else "a target with more memory"
        if feasible.space.changes_shape and not safe:
            keep = "--set plan.top_k=keep --set plan.expert_width=keep"
        raise InfeasibleError(
            f"{chosen} loses {kl_nats:.3f} nats per token, the limit is {limit:g}",
            where="plan.max_kl_nats" + ("" if settings.max_kl_nats is not None else " (not set: the safe limit)"),
            why=f"masked KL before recovery: {detail}" + (f". By experts kept: {_points(curve)}" if curve else ""),
            next_command=f"{keep}, or --set plan.force=true",
        )
    if kl_nats > limit:
        return [f"Forced: {chosen} loses {kl_nats:.3f} nats per token before recovery, the limit is {limit:g}."]
    if kl_nats > DOUBTFUL_KL_NATS:
        where = f" ({_points(curve)})" if curve else ""
        text = f"Doubtful: {chosen} loses {kl_nats:.3f} nats per token before recovery{where}."
        log.warning("%s", text)
        return [text]
    return []


def _points(curve: Curve) -> str:
    return ", ".join(f"{point.experts}: {point.kl_nats:.3f}" for point in curve.points)
