"""The decision with measured numbers: how many experts and which bits, where an absolute budget leaves both free.

Every count of experts on the safe-ratio curve gets the bits that cost it least (spend.py); its predicted KL is the
curve's masked KL plus the quantization's. The least wins; "keep every expert, quantize harder" is one of the counts and
is always named, as the winner or as the competitor. Merged experts weigh as much as kept ones, so the same numbers hold
for them.

Units: KL in nats per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.quantization import CODEBOOK_LEVELS
from moe_edge.planning.allocation import RECIPE_KL_NATS, Feasible, mixes_are_allowed, prior_dropped_nats, settle
from moe_edge.planning.bits import Sensitivity, prior_sensitivity
from moe_edge.planning.curve import Curve, CurvePoint
from moe_edge.planning.notes import notes_of
from moe_edge.planning.options import Option
from moe_edge.planning.spend import allocate


@dataclass(frozen=True)
class Quantization:
    """What the bits of the delivered GGUF files are predicted to cost."""

    nats: Mapping[str, float]  # label of a GGUF type -> KL
    source: Literal["measured", "prior"]
    tokens: int = 0


@dataclass(frozen=True)
class _Way:
    """One count of experts with its best bits."""

    option: Option
    quantization_nats: float
    masked_nats: float

    @property
    def nats(self) -> float:
        return self.masked_nats + self.quantization_nats


def bits_are_free(feasible: Feasible, config: BuildConfig) -> bool:
    """May the solver choose bits per class? Only under an absolute budget that binds, and where no type was asked for.

    Where the target's preferred type holds every expert, more bits would only cost speed; under a relative budget the
    recipe is a part of what was asked.
    """
    if not mixes_are_allowed(feasible.demand, config):
        return False
    preferred = feasible.space.option(feasible.model.spec.moe.experts, feasible.demand.preferred[0])
    return not preferred.fits


def decide(feasible: Feasible, curve: Curve, sensitivity: Sensitivity | None = None) -> tuple[Feasible, Quantization]:
    """The plan with the least predicted KL, and what its bits cost.

    Args:
        feasible: the answer from headers alone, whose `bits_are_free`.
        sensitivity: measured; None = priors.
    """
    space, total = feasible.space, feasible.model.spec.moe.experts
    known = sensitivity or prior_sensitivity(feasible.model)
    ways: list[_Way] = []
    for experts in feasible.demand.counts:
        masked = curve.kl_nats(experts)
        least = min((way.nats for way in ways if way.option.experts != total), default=inf)
        if masked < least and (found := allocate(space, experts, known)) is not None:  # bits cost at least nothing
            ways.append(_Way(found[0], found[1], masked))
    if not ways:
        return feasible, quantization_of(feasible, known)
    best = min(ways, key=lambda way: (way.nats, -way.option.experts))
    others = [way for way in ways if (way.option.experts == total) != (best.option.experts == total)]
    rival = min(others, key=lambda way: way.nats, default=None)
    settled = replace(
        feasible,
        choice=best.option,
        rival=None if rival is None else rival.option,
        rival_lost="" if rival is None else _compared(best, rival),
        notes=(*notes_of(space, feasible.demand, best.option), _bits_note(best, known)),
    )
    if rival is None and best.option.experts < total:
        settled = replace(settled, notes=(*settled.notes, "Keeping every expert fits at no number of bits."))
    return settled, quantization_of(settled, known)


def decide_by_priors(feasible: Feasible, config: BuildConfig) -> Feasible:
    """What `decide` or `settle` would say if the model behaved like the one behind the priors: for a dry run, which may
    measure nothing. At another top-k or width there is no prior, and the answer from headers stays."""
    if feasible.space.changes_shape:
        return feasible
    total = feasible.model.spec.moe.experts
    if not bits_are_free(feasible, config):
        settled = settle(feasible, prior_dropped_nats(feasible.choice.experts, total))
        return replace(settled, notes=feasible.notes) if settled.choice is feasible.choice else settled
    points = tuple(CurvePoint(count, prior_dropped_nats(count, total), None) for count in feasible.demand.counts)
    settled, _ = decide(feasible, Curve("prior", total, feasible.space.top_k, 0, points))
    return settled


def _compared(best: _Way, rival: _Way) -> str:
    def parts(way: _Way) -> str:
        return f"{way.nats:.3f} nats ({way.masked_nats:.3f} experts + {way.quantization_nats:.3f} bits)"

    return f"expected KL {parts(rival)}, against {parts(best)} before recovery"


def _bits_note(best: _Way, sensitivity: Sensitivity) -> str:
    how = f"measured on {sensitivity.tokens} tokens" if sensitivity.source == "measured" else "from priors"
    packing = best.option.packing
    mix = (
        ", ".join(f"{key} {kind}" for key, kind in packing.mix) or f"{packing.name} as it is, no mix is clearly better"
    )
    slow = ", ".join(kind for kind in CODEBOOK_LEVELS if kind in {kind for _, kind in packing.mix})
    told = f" A CPU decodes {slow} slower than other types; a budget of decode_tokens_per_s rules them out there."
    cost = f"expected to cost {best.quantization_nats:.3f} nats."
    return f"Bits by least KL per byte ({how}): {mix}; {cost}{told if slow else ''}"


def quantization_of(feasible: Feasible, sensitivity: Sensitivity | None = None) -> Quantization:
    """What the main file and the target's further types cost: from a sensitivity, or from the recipes' own prior."""
    packing = feasible.choice.packing
    names = [feasible.quantization, *feasible.space.target.quantization.gguf]
    layers = feasible.model.spec.layers
    if "gguf" not in feasible.demand.formats:
        return Quantization({}, "prior")
    if sensitivity is None:
        return Quantization({name: RECIPE_KL_NATS[name] for name in names if name in RECIPE_KL_NATS}, "prior")
    found = {name: sensitivity.of_packing(packing._replace(name=name, mix=()), layers) for name in names}
    if packing.mix:
        del found[packing.name]
        found = {packing.label: sensitivity.of_packing(packing, layers)} | found
    return Quantization(found, sensitivity.source, sensitivity.tokens)
