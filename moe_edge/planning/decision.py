"""The decision with measured numbers: how many experts and which bits, and what the bits are predicted to cost.

Where an absolute budget leaves both free (`bits_are_free`), every count of experts on the safe-ratio curve gets the bits
that cost it least (spend.py); its predicted KL is the curve's masked KL plus the quantization's (`decide`). The least wins;
"keep every expert, quantize harder" is one of the counts and is always named, as the winner or as the competitor. Elsewhere
the choice from headers alone is compared with that competitor once the masked KL is known (`settle`). Merged experts weigh
as much as kept ones, so the same numbers hold for them.

Units: KL in nats per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.quantization import CODEBOOK_LEVELS
from moe_edge.planning.allocation import (
    RECIPE_KL_NATS,
    BudgetAnswer,
    forbidden_reason,
    mixes_are_allowed,
    prior_dropped_nats,
)
from moe_edge.planning.bits import Sensitivity, prior_sensitivity
from moe_edge.planning.curve import Curve, CurvePoint
from moe_edge.planning.notes import describe, notes_of
from moe_edge.planning.options import Option
from moe_edge.planning.spend import allocate


@dataclass(frozen=True)
class QuantizationCost:
    """What the bits of the delivered GGUF files are predicted to cost."""

    nats: Mapping[str, float]  # label of a GGUF type -> KL
    source: Literal["measured", "prior"]
    tokens: int = 0


@dataclass(frozen=True)
class _CountOption:
    """One count of experts with its best bits."""

    option: Option
    quantization_nats: float
    masked_nats: float

    @property
    def nats(self) -> float:
        return self.masked_nats + self.quantization_nats

    @property
    def in_words(self) -> str:
        return f"{self.nats:.3f} nats ({self.masked_nats:.3f} experts + {self.quantization_nats:.3f} bits)"


def bits_are_free(answer: BudgetAnswer, config: BuildConfig) -> bool:
    """May the solver choose bits per class? Only under an absolute budget that binds, and where no type was asked for.

    Where the target's preferred type holds every expert that may stay, more bits would only cost speed; under a share of
    the experts the recipe is a part of what was asked.
    """
    if not mixes_are_allowed(answer.demand, config):
        return False
    preferred = answer.space.option(answer.demand.counts[0], answer.demand.preferred[0])
    return not preferred.fits


def decide(
    answer: BudgetAnswer, curve: Curve, sensitivity: Sensitivity | None = None
) -> tuple[BudgetAnswer, QuantizationCost]:
    """The answer with the least predicted KL, and what its bits cost.

    Args:
        answer: from headers alone; its `bits_are_free`.
        sensitivity: measured; None = priors.
    """
    space, total = answer.space, answer.model.spec.moe.experts
    known = sensitivity or prior_sensitivity(answer.model)
    found: list[_CountOption] = []
    for experts in answer.demand.counts:
        masked = curve.kl_nats(experts)
        least = min((one.nats for one in found if one.option.experts != total), default=inf)
        if masked < least and (spent := allocate(space, experts, known)) is not None:  # bits cost at least nothing
            found.append(_CountOption(spent[0], spent[1], masked))
    if not found:
        return answer, quantization_of(answer, known)
    best = min(found, key=lambda one: (one.nats, -one.option.experts))
    others = [one for one in found if (one.option.experts == total) != (best.option.experts == total)]
    rival = min(others, key=lambda one: one.nats, default=None)
    notes = [*notes_of(space, answer.demand, best.option), _bits_note(best, known)]
    if answer.demand.counts[0] < total:  # all of them were not asked for, which the answer from headers says
        decided = replace(answer, choice=best.option, notes=tuple(notes))
        return decided, quantization_of(decided, known)
    if rival is None and best.option.experts < total:
        notes.append("Keeping every expert fits at no number of bits.")
    lost = "" if rival is None else f"expected KL {rival.in_words}, against {best.in_words} before recovery"
    rival_option = None if rival is None else rival.option
    decided = replace(answer, choice=best.option, rival=rival_option, rival_lost=lost, notes=tuple(notes))
    return decided, quantization_of(decided, known)


def settle(answer: BudgetAnswer, masked_kl_nats: float) -> BudgetAnswer:
    """Compare the pruned choice with quantizing harder, now that the cost of pruning has been measured.

    The rival wins only where it is allowed, fits, and its expected KL is lower than the masked KL plus what the
    choice's own recipe is expected to cost. Recovery by distillation is not counted, because it has not been measured
    yet.
    """
    choice, rival = answer.choice, answer.rival
    if rival is None or any(option.packing.name not in RECIPE_KL_NATS for option in (choice, rival)):
        return answer
    ours, theirs = masked_kl_nats + RECIPE_KL_NATS[choice.packing.name], RECIPE_KL_NATS[rival.packing.name]
    numbers = f"expected KL {theirs:.3f} nats, against {ours:.3f} before recovery for {describe(choice, answer.model)}"
    forbidden = forbidden_reason(rival, answer.demand)
    if forbidden is None and rival.fits and theirs < ours:
        lost = f"expected KL {ours:.3f} nats before recovery, against {theirs:.3f}"
        notes = tuple(notes_of(answer.space, answer.demand, rival))
        return replace(answer, choice=rival, rival=choice, rival_lost=lost, notes=notes)
    if theirs < ours:
        note = f"{describe(rival, answer.model)} would lose less here ({numbers}), but: {answer.rival_lost}."
        return replace(answer, rival_lost=f"{answer.rival_lost} ({numbers})", notes=(*answer.notes, note))
    reason = answer.rival_lost if forbidden or not rival.fits else "loses more"
    return replace(answer, rival_lost=f"{reason} ({numbers})")


def decide_by_priors(answer: BudgetAnswer, config: BuildConfig) -> BudgetAnswer:
    """What `decide` or `settle` would say if the model behaved like the one behind the priors: for a dry run, which may
    measure nothing. At another top-k or width there is no prior, and the answer from headers stays."""
    if answer.space.changes_shape:
        return answer
    total = answer.model.spec.moe.experts
    if not bits_are_free(answer, config):
        settled = settle(answer, prior_dropped_nats(answer.choice.experts, total))
        return replace(settled, notes=answer.notes) if settled.choice is answer.choice else settled
    points = tuple(CurvePoint(count, prior_dropped_nats(count, total), None) for count in answer.demand.counts)
    decided, _ = decide(answer, Curve("prior", total, answer.space.top_k, 0, points))
    return decided


def quantization_of(answer: BudgetAnswer, sensitivity: Sensitivity | None = None) -> QuantizationCost:
    """What the main file and the target's further types cost: from a sensitivity, or from the recipes' own prior."""
    packing = answer.choice.packing
    names = [answer.quantization, *answer.space.target.quantization.gguf]
    layers = answer.model.spec.layers
    if "gguf" not in answer.demand.formats:
        return QuantizationCost({}, "prior")
    if sensitivity is None:
        return QuantizationCost({name: RECIPE_KL_NATS[name] for name in names if name in RECIPE_KL_NATS}, "prior")
    nats = {name: sensitivity.of_packing(packing._replace(name=name, mix=()), layers) for name in names}
    if packing.mix:
        del nats[packing.name]
        nats = {packing.label: sensitivity.of_packing(packing, layers)} | nats
    return QuantizationCost(nats, sensitivity.source, sensitivity.tokens)


def _bits_note(best: _CountOption, sensitivity: Sensitivity) -> str:
    how = f"measured on {sensitivity.tokens} tokens" if sensitivity.source == "measured" else "from priors"
    packing = best.option.packing
    named = ", ".join(f"{key} {kind}" for key, kind in packing.mix)
    mix = named or f"{packing.name} as it is, no mix is clearly better"
    slow = ", ".join(kind for kind in CODEBOOK_LEVELS if kind in dict(packing.mix).values())
    warning = f" A CPU decodes {slow} slower than other types; a budget of decode_tokens_per_s rules them out there."
    cost = f"expected to cost {best.quantization_nats:.3f} nats."
    return f"Bits by least KL per byte ({how}): {mix}; {cost}{warning if slow else ''}"
