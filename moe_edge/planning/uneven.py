"""Layers that keep different numbers of experts (plan.uneven): how far they may differ, and what that costs the files.

The student is one checkpoint with the largest layer's number of experts everywhere; the others are padded, which is exact
in some families only (contracts/capability_table.py). A GGUF stores the padding, an ONNX graph does not. So under uneven
layers a GGUF is as large as with the largest number everywhere, and no layer may grow beyond what the budget holds then.
"""

from moe_edge.contracts.capabilities import RUNTIME_OF_FORMAT, capability
from moe_edge.contracts.plan import Plan
from moe_edge.contracts.spec import keepable_counts
from moe_edge.contracts.units import format_bytes
from moe_edge.formulas.uneven import LEAST_SHARE
from moe_edge.planning.allocation import Feasible


def most_places(feasible: Feasible) -> int:
    """The most experts that one layer may keep: with so many everywhere a padded file still meets the budgets."""
    choice, space = feasible.choice, feasible.space
    if not stores_padding(feasible):
        return space.model.spec.moe.experts
    more = [count for count in keepable_counts(space.model.spec, space.top_k) if count >= choice.experts]
    fitting = [count for count in more if space.option(count, choice.packing).fits]
    return max(fitting, default=choice.experts)


def stores_padding(feasible: Feasible) -> bool:
    """Does the main file hold padding experts, too?"""
    row = capability(RUNTIME_OF_FORMAT[feasible.choice.packing.format], feasible.model.spec.family)
    return row is None or row.uneven == "padded"


def as_uneven(plan: Plan, feasible: Feasible) -> Plan:
    """`plan` with what its layers' different sizes mean: the file's bytes, and a word about them. As it is where all agree."""
    if not plan.uneven:
        return plan
    counts = [len(ids) for ids in plan.kept.values()]
    notes = [*plan.notes, _note(plan, min(counts))]
    estimate = plan.estimate
    if stores_padding(feasible):
        padded = feasible.space.option(plan.places, feasible.choice.packing).estimate
        told = ("file_bytes", "peak_memory_bytes", "decode_bytes_per_token", "decode_tokens_per_s")
        estimate = estimate.model_copy(update={name: getattr(padded, name) for name in told})
        even = feasible.choice.estimate.file_bytes
        notes.append(
            f"A GGUF stores padding: {format_bytes(estimate.file_bytes)} instead of {format_bytes(even)}, as much as "
            f"{plan.places} real experts in every layer. ONNX stores none of it."
        )
    return plan.model_copy(update={"estimate": estimate, "notes": notes})


def _note(plan: Plan, fewest: int) -> str:
    return (
        f"Layers keep {fewest} to {plan.places} experts, {plan.experts_kept} on average and at least {LEAST_SHARE:.0%} of that; "
        "smaller layers are padded with experts that are never chosen."
    )
