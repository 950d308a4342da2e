"""From a decision to the finished document: what stays and what it costs, what the action adds, and what must be said.

The planner chooses experts by masking them in the teacher, which predicts `drop` exactly. The other actions start from the
same choice (dense from the D-optimal one) and add to it: the pairs of a merge, the width, the rank. Layers that keep different
numbers of experts (plan.uneven) change the files: the student is one checkpoint with the largest layer's number everywhere;
the others are padded, which is exact in some families only (contracts/capability_table.py). A GGUF stores the padding, an
ONNX graph does not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_edge.compression.layers import Material
from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.plan import Candidate, KeptExperts, Plan
from moe_edge.contracts.spec import ModelSpec
from moe_edge.contracts.units import format_bytes
from moe_edge.formulas.merging import assign_merges
from moe_edge.formulas.selection import select
from moe_edge.formulas.uneven import LEAST_SHARE
from moe_edge.models.dense import DENSE_OF
from moe_edge.planning.allocation import BudgetAnswer
from moe_edge.planning.decision import QuantizationCost
from moe_edge.planning.demand import DENSE_CRITERION
from moe_edge.planning.options import largest_contexts
from moe_edge.planning.scoring import JudgingRows, MaskedKl
from moe_edge.storage.statistics import Statistics

KEEP_ALL = "keep-all"
K_QUANT_STEP = 256  # weights of one super-block of llama.cpp's K-quants


@dataclass(frozen=True)
class PlanInputs:
    """What a plan is made from besides the headers' answer."""

    config: BuildConfig
    headers: CheckpointHeaders
    material: Callable[[], Material]  # reads the profile's statistics, and rows to fit on; asked where they are needed
    rows: Callable[[], JudgingRows]  # reads those that judge
    held_whole: bool  # will `compress` hold the whole teacher? Only then can something be refitted

    def statistics(self) -> Statistics:
        """The profile's."""
        statistics = self.material().statistics
        assert statistics is not None
        return statistics


def make_plan(
    answer: BudgetAnswer,
    criterion: str,
    kept: KeptExperts,
    results: Mapping[str, MaskedKl],
    notes: Sequence[str],
    quantization: QuantizationCost,
) -> Plan:
    """A decision as a document, not yet finished; candidates in ascending KL."""
    ranked = sorted(results.items(), key=lambda item: item[1].kl_nats)
    return Plan(
        criterion=criterion,
        experts_total=answer.model.spec.moe.experts,
        experts_kept=answer.choice.experts,
        uneven=len({len(ids) for ids in kept.values()}) > 1,
        top_k=answer.space.top_k,
        teacher_top_k=answer.model.spec.moe.top_k,
        expert_width=answer.space.width,
        kept={layer: list(ids) for layer, ids in kept.items()},
        quantization=answer.quantization,
        quantization_by_class=dict(answer.choice.packing.mix),
        quantization_kl_nats=dict(quantization.nats),
        quantization_kl_source=quantization.source,
        onnx_precision=answer.onnx_precision,
        predicted_kl_nats=results[criterion].kl_nats if criterion in results else None,
        candidates=[
            Candidate(criterion=name, kl_nats=result.kl_nats, kl_nats_ci95=result.ci95, n_tokens=result.n_tokens)
            for name, result in ranked
        ],
        estimate=answer.choice.estimate,
        largest_contexts=largest_contexts(answer.space, answer.choice),
        competitor=answer.competitor,
        notes=[*answer.notes, *notes],
    )


def finish_plan(plan: Plan, answer: BudgetAnswer, inputs: PlanInputs) -> Plan:
    """`plan` completed by what the configured action and uneven layers need.

    Raises:
        ConfigError: the action needs the profile's CKA, and there is none.
    """
    plan = with_action(plan, inputs.config, answer.model.spec, inputs.statistics, inputs.held_whole)
    return with_padding(plan, answer) if plan.uneven else plan


def with_action(
    plan: Plan, config: BuildConfig, spec: ModelSpec, statistics: Callable[[], Statistics], held_whole: bool = True
) -> Plan:
    """`plan` (what to drop, and the shape of what stays) completed by what the configured action needs.

    Args:
        statistics: reads the profile's statistics; only asked where the action chooses by them.
        held_whole: see `PlanInputs`.

    Raises:
        ConfigError: the action needs the profile's CKA, and there is none.
    """
    settings, asked = config.plan, config.plan.expert_width
    width = plan.expert_width if isinstance(asked, str) else asked
    width = None if width == spec.moe.expert_width else width
    changes: dict[str, Any] = {
        "action": settings.action,
        "expert_width": width,
        "compensate": settings.compensate is True,
        "sequential": settings.sequential,
        "action_tokens": settings.action_tokens,
    }
    if settings.action == "merge" and plan.prunes:
        changes["merges"] = _merges(plan, spec, _with_cka(statistics(), "merge"))
    elif settings.action == "shared-core":
        changes["shared_rank"] = settings.shared_rank
    elif settings.action == "dense" and plan.prunes and settings.criterion == "auto":
        chosen = select(DENSE_CRITERION, _with_cka(statistics(), "dense"), plan.experts_kept, groups=spec.moe.groups)
        changes["kept"] = {layer: chosen[position] for position, layer in enumerate(spec.moe_layers)}
        changes["criterion"] = DENSE_CRITERION
    if settings.action in ("dense", "shared-core"):
        changes["predicted_kl_nats"] = None  # masking predicts what dropping costs
    if settings.compensate == "auto" and held_whole:
        narrower = width is not None or plan.top_k < spec.moe.top_k
        changes["compensate"] = settings.action != "shared-core" and (plan.prunes or narrower)
    changes["notes"] = [*plan.notes, *_action_notes(plan, spec, changes)]
    return Plan.model_validate(plan.model_dump(by_alias=True) | changes)


def _merges(plan: Plan, spec: ModelSpec, statistics: Statistics) -> dict[int, dict[int, int]]:
    """Decoder layer -> dropped expert -> the kept one that CKA names."""
    positions = {layer: position for position, layer in enumerate(spec.moe_layers)}
    pairs = assign_merges(statistics, {positions[layer]: ids for layer, ids in plan.kept.items()})
    return {layer: pairs[positions[layer]] for layer in plan.kept}


def _with_cka(statistics: Statistics, action: str) -> Statistics:
    if statistics.cka_tokens:
        return statistics
    raise ConfigError(
        f"the action {action} needs a profile with CKA",
        where="plan.action",
        why="the profile has no CKA: profile.cka_tokens is 0",
        next_command="--set profile.cka_tokens=8192",
    )


def _action_notes(plan: Plan, spec: ModelSpec, changes: Mapping[str, Any]) -> list[str]:
    """What an action means for the numbers beside it."""
    notes, action, width = [], changes["action"], changes["expert_width"]
    if action == "merge":
        proposed = sum(len(pairs) for pairs in changes.get("merges", {}).values())
        total = len(spec.moe_layers) * (spec.moe.experts - plan.experts_kept)
        notes.append(
            f"CKA proposes {proposed} merges for {total} dropped experts; compress tests every pair and drops the others. "
            "The predicted KL is that of dropping them all."
        )
    if action == "shared-core":
        notes.append(
            "The shared core is trainable, but no runtime executes it: the export folds it into ordinary experts, so that "
            "the file is as large as after dropping. Bytes and speed here are those of the folded student; its KL is not "
            "predicted by masking."
        )
    if action == "dense":
        kind, single = DENSE_OF.get(spec.family), "checkpoint with one expert, since no dense class fits"
        stored = f"a {kind} checkpoint" if kind else f"a {spec.family} {single}"
        notes.append(
            f"The dense student ({stored}) runs {plan.experts_kept} experts for every token, not {plan.top_k}, and needs "
            "distillation; its KL is not predicted by masking."
        )
    if width is not None:
        whole_blocks = width % K_QUANT_STEP == 0
        rows = "" if whole_blocks else f" {width} is no multiple of {K_QUANT_STEP}: K-quants fall back there."
        notes.append(
            f"Experts keep {width} of {spec.moe.expert_width} neurons; the predicted KL is with the others silent.{rows}"
        )
    if changes["compensate"]:
        notes.append("Down projections are refitted by compress; masking does not count the gain.")
    return notes


def with_padding(plan: Plan, answer: BudgetAnswer) -> Plan:
    """An uneven `plan` with what its layers' different sizes mean: the file's bytes, and a word about them."""
    fewest, most = min(map(len, plan.kept.values())), plan.places
    notes = [
        *plan.notes,
        f"Layers keep {fewest} to {most} experts, {plan.experts_kept} on average and at least {LEAST_SHARE:.0%} of that; "
        "smaller layers are padded with experts that are never chosen.",
    ]
    estimate, choice = plan.estimate, answer.choice
    if answer.space.stores_padding(choice.packing):
        padded = answer.space.option(most, choice.packing).estimate
        estimate = estimate.model_copy(
            update={
                "file_bytes": padded.file_bytes,
                "peak_memory_bytes": padded.peak_memory_bytes,
                "decode_bytes_per_token": padded.decode_bytes_per_token,
                "decode_tokens_per_s": padded.decode_tokens_per_s,
            }
        )
        notes.append(
            f"A GGUF stores padding: {format_bytes(estimate.file_bytes)} instead of "
            f"{format_bytes(choice.estimate.file_bytes)}, as much as {most} real experts in every layer. "
            "ONNX stores none of it."
        )
    return plan.model_copy(update={"estimate": estimate, "notes": notes})
