"""plan: which experts stay and how the student is stored, from headers, statistics and masked KL; changes nothing.

The budget is solved first, from headers alone. If experts must go, every criterion's choice is masked in the teacher
on the same calibration tokens and the least KL wins; `random` is always beside it, because on some models no
criterion beats it. The KL of the chosen one is the build's prediction. Writes plan.json: readable, editable, without
tensors, the same bytes every time.

Shape suffixes: L layers, E experts, N rows, S tokens of a row.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_edge.compression.allocation import Feasible, describe, header_plan, settle, shown_options
from moe_edge.compression.masking import Kept, MaskedKl, masked_kl
from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import ConfigError, InfeasibleError, InputRejected
from moe_edge.contracts.plan import Candidate, Plan
from moe_edge.families.counting import describe_model
from moe_edge.families.loading import load_model
from moe_edge.formulas.selection import CRITERIA, select
from moe_edge.storage.checkpoint import CheckpointHeaders, inspect_checkpoint
from moe_edge.storage.files import write_text_atomic
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics

log = logging.getLogger(__name__)
KEEP_ALL = "keep-all"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(context: StageContext) -> dict[str, Any]:
    """Write plan.json; returns {criterion, candidates, experts_kept, predicted_kl_nats, estimate, notes, ...}.

    Raises:
        InfeasibleError: nothing fits the budget, or the masked KL exceeds plan.max_kl_nats.
        ConfigError, InputRejected: as `header_plan`; a profile that does not belong to the teacher.
    """
    feasible = header_plan(inspect_checkpoint(context.teacher), context.config)
    if changes_routing(feasible):
        plan = _measured_plan(feasible, context)
    else:
        why = "Every expert is kept, so there is no masked KL to measure and no criterion to choose."
        plan = make_plan(feasible, KEEP_ALL, _all_experts(feasible), {}, (why,))
    write_text_atomic(context.out / "plan.json", plan.to_json())
    log.info("plan: %s, predicted KL %s nats", describe(feasible.choice, feasible.model), plan.predicted_kl_nats)
    return plan.model_dump(mode="json", by_alias=True, exclude={"kept"})


def changes_routing(feasible: Feasible) -> bool:
    """Will the student route differently from the teacher?"""
    return not feasible.keeps_all or feasible.space.top_k != feasible.model.spec.moe.top_k


def _all_experts(feasible: Feasible) -> Kept:
    spec = feasible.model.spec
    return {layer: list(range(spec.moe.experts)) for layer in range(spec.layers)}


def _measured_plan(feasible: Feasible, context: StageContext) -> Plan:
    """Score the choices by masked KL, take the least, and let "quantize harder" compete with it."""
    config, folder = context.config, context.inputs["profile"]
    choices = {KEEP_ALL: _all_experts(feasible)}
    if not feasible.keeps_all:
        choices = choose(feasible, config, read_statistics(folder, feasible))
    ids_NS, where = calibration_rows(folder / "rows.safetensors", config.plan.tokens)
    top_k = feasible.space.top_k
    results = masked_kl(
        _load_teacher(context), choices, ids_NS, top_k if top_k != feasible.model.spec.moe.top_k else None
    )
    best = (
        min(results, key=lambda name: results[name].kl_nats)
        if config.plan.criterion == "auto"
        else config.plan.criterion
    )
    best = best if best in results else KEEP_ALL
    settled = settle(feasible, results[best].kl_nats)
    if settled.choice is not feasible.choice:
        return make_plan(settled, KEEP_ALL, _all_experts(feasible), results, (where,))
    _refuse_beyond_limit(settled, best, results, config)
    return make_plan(settled, best, choices[best], results, (where, *_honesty(best, results)))


def _load_teacher(context: StageContext) -> torch.nn.Module:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    auto = torch.bfloat16 if device == "cuda" else torch.float32
    return load_model(context.teacher, dtype=_DTYPES.get(context.config.teacher.dtype, auto)).to(device)


def read_statistics(folder: Path, feasible: Feasible) -> Statistics:
    """The profile's statistics. Raises InputRejected when they are of a model with other layers or experts."""
    path = folder / "statistics.safetensors"
    stats, spec = Statistics.load(path), feasible.model.spec
    if tuple(stats.counts_LE.shape) != (spec.layers, spec.moe.experts):
        raise InputRejected(
            "the profile belongs to another teacher",
            where=str(path),
            why=f"it has (layers, experts) = {tuple(stats.counts_LE.shape)}, not ({spec.layers}, {spec.moe.experts})",
            next_command="moe-edge profile TEACHER --fresh",
        )
    return stats


def choose(feasible: Feasible, config: BuildConfig, stats: Statistics) -> dict[str, Kept]:
    """The kept experts under every criterion (auto), or under the named one with `random` beside it.

    Raises:
        ConfigError: cka-diverse was asked for and the profile has no CKA.
    """
    wanted = (
        list(CRITERIA) if config.plan.criterion == "auto" else list(dict.fromkeys([config.plan.criterion, "random"]))
    )
    if not stats.cka_tokens and "cka-diverse" in wanted:
        if config.plan.criterion != "auto":
            raise ConfigError(
                "cka-diverse needs a profile with CKA",
                where="plan.criterion",
                why="profile.cka_tokens is 0",
                next_command="--set profile.cka_tokens=8192, or --set plan.criterion=auto",
            )
        wanted.remove("cka-diverse")
    return {name: select(name, stats, feasible.choice.experts, config.plan.seed) for name in wanted}


def calibration_rows(path: Path, tokens: int) -> tuple[Tensor, str]:
    """The last whole rows of the calibration set that hold about `tokens` tokens, and a sentence that says which.

    Returns:
        ids_NS int64 (at least one row).
    """
    ids_NS = torch.from_numpy(TokenRows.load(path).ids_NS).long()
    total, width = ids_NS.shape
    rows = min(total, max(1, tokens // width))
    where = (
        f"Masked KL on the calibration rows {total - rows}..{total - 1} of {total} ({rows * width} tokens); the "
        "profile's statistics saw these rows too, so the prediction is slightly optimistic on other text."
    )
    return ids_NS[-rows:], where


def _refuse_beyond_limit(feasible: Feasible, best: str, results: dict[str, MaskedKl], config: BuildConfig) -> None:
    limit, value = config.plan.max_kl_nats, results[best].kl_nats
    if limit is None or value <= limit or config.plan.force:
        return
    ranked = sorted(results, key=lambda name: results[name].kl_nats)
    table = ", ".join(f"{name} {results[name].kl_nats:.3f}" for name in ranked)
    raise InfeasibleError(
        f"{describe(feasible.choice, feasible.model)} loses {value:.3f} nats per token, the limit is {limit:g}",
        where="plan.max_kl_nats",
        why=f"masked KL before recovery, per criterion: {table}",
        next_command="keep more experts (--set plan.experts=... or a larger budget), or --set plan.force=true",
    )


def _honesty(best: str, results: dict[str, MaskedKl]) -> list[str]:
    """What the numbers do not support, said beside them."""
    chosen, chance = results[best], results.get("random")
    notes = []
    if chance is not None and best != "random" and not chosen.clearly_below(chance):
        numbers = f"{chosen.kl_nats:.3f} against {chance.kl_nats:.3f} nats"
        notes.append(f"'{best}' is not clearly better than a random choice on these rows ({numbers}).")
    if best == "random":
        notes.append("A random choice did best: no criterion describes this teacher's experts.")
    return notes


def make_plan(
    feasible: Feasible, criterion: str, kept: Kept, results: dict[str, MaskedKl], notes: tuple[str, ...]
) -> Plan:
    """The plan as a document; candidates in ascending KL."""
    ranked = sorted(results.items(), key=lambda item: item[1].kl_nats)
    return Plan(
        criterion=criterion,
        experts_total=feasible.model.spec.moe.experts,
        experts_kept=feasible.choice.experts,
        top_k=feasible.space.top_k,
        kept={layer: list(ids) for layer, ids in kept.items()},
        quantization=feasible.quantization,
        onnx_precision=feasible.onnx_precision,
        predicted_kl_nats=results[criterion].kl_nats if criterion in results else None,
        candidates=[
            Candidate(criterion=name, kl_nats=result.kl_nats, kl_nats_ci95=result.ci95, n_tokens=result.n_tokens)
            for name, result in ranked
        ],
        estimate=feasible.choice.estimate,
        competitor=feasible.competitor,
        notes=[*feasible.notes, *notes],
    )


def dry_run(headers: CheckpointHeaders, config: BuildConfig, profile: Path | None = None) -> dict[str, Any]:
    """What fits, what it costs and why, from headers alone (and the statistics of a profile, if there is one).

    Returns:
        JSON-able {teacher, target, budget, choice, competitor, options, criteria, notes}; sizes in bytes.

    Raises:
        As `header_plan`.
    """
    feasible = header_plan(headers, config)
    spec = feasible.model.spec
    return {
        "teacher": describe_model(headers),
        "target": config.target.name,
        "budget": config.target.budget.model_dump(mode="json", exclude_none=True),
        "choice": {
            "experts_kept": feasible.choice.experts,
            "experts_total": spec.moe.experts,
            "top_k": feasible.space.top_k,
            "quantization": feasible.quantization,
            "onnx_precision": feasible.onnx_precision,
            "estimate": feasible.choice.estimate.model_dump(mode="json"),
        },
        "competitor": feasible.competitor,
        "options": [option.row() for option in shown_options(feasible)],
        "criteria": _previews(feasible, config, profile),
        "notes": list(feasible.notes),
    }


def _previews(feasible: Feasible, config: BuildConfig, profile: Path | None) -> list[dict[str, Any]]:
    """Per criterion, how much of the teacher's routing the kept experts carried; needs no model."""
    if profile is None or feasible.keeps_all or not (profile / "statistics.safetensors").is_file():
        return []
    stats = read_statistics(profile, feasible)
    return [
        {
            "criterion": name,
            "routed_share_kept": _share(stats.counts_LE, kept),
            "gate_share_kept": _share(stats.gate_sum_LE, kept),
        }
        for name, kept in choose(feasible, config, stats).items()
    ]


def _share(sums_LE: Tensor, kept: Kept) -> float:
    total = float(sums_LE.sum())
    return sum(float(sums_LE[layer, list(ids)].sum()) for layer, ids in kept.items()) / total if total else 0.0
