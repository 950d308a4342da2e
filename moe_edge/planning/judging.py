"""Judging the candidates of a plan: which rows judge, which the search may read, and what the numbers do not support.

Shape suffixes: N rows, S tokens of a row.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moe_edge.compression.width import Narrowing
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.spec import keepable_counts
from moe_edge.models.pruning import NeuronMask
from moe_edge.planning.allocation import Feasible
from moe_edge.planning.candidates import AUTO, SEARCH, Candidates, Kept, criteria_to_compare
from moe_edge.planning.curve import Score
from moe_edge.planning.demand import earlier_plan
from moe_edge.planning.masking import MaskedKl
from moe_edge.planning.scorer import Teacher
from moe_edge.planning.search import Found, Rules, search
from moe_edge.planning.uneven import most_places
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics

THINNER_SHARE = 0.75  # of the experts; at which criteria are compared where all of them may stay


@dataclass(frozen=True)
class CalibrationRows:
    """The profile's rows: the last ones judge the candidates, the search may read the others."""

    judged_NS: Tensor  # int64, at least one row
    search_NS: Tensor
    where: str  # which rows judged, in a sentence


def calibration_rows(path: Path, tokens: int) -> CalibrationRows:
    """The last whole rows of the calibration set that hold about `tokens` tokens judge; the rest is for the search."""
    ids_NS = torch.from_numpy(TokenRows.load(path).ids_NS).long()
    total, width = ids_NS.shape
    rows = min(total, max(1, tokens // width))
    where = (
        f"Masked KL on the calibration rows {total - rows}..{total - 1} of {total} ({rows * width} tokens); the "
        "profile's statistics saw these rows too, so the prediction is slightly optimistic on other text."
    )
    return CalibrationRows(ids_NS[total - rows :], ids_NS[: total - rows], where)


def candidates_of(feasible: Feasible, config: BuildConfig, stats: Statistics) -> Candidates:
    """How experts are chosen for this model under this configuration.

    Raises:
        ConfigError: plan.within is no plan of this model.
    """
    spec, plan = feasible.model.spec, config.plan
    within = earlier_plan(plan.within, spec).kept if plan.within else {}
    chosen = Candidates(stats, spec.moe_layers, spec.moe.groups, plan.seed, plan.super_expert_guard, within)
    if not plan.uneven:
        return chosen
    possible = keepable_counts(spec, feasible.space.top_k)
    return replace(chosen, uneven=True, possible=possible, most=most_places(feasible))


def choose(feasible: Feasible, config: BuildConfig, chosen: Candidates) -> dict[str, Kept]:
    """The kept experts under every criterion (auto), or under the named one with `random` beside it.

    Raises:
        ConfigError: the named criterion needs CKA and the profile has none.
    """
    names = criteria_to_compare(config.plan.criterion, chosen.stats)
    return {name: chosen.kept(name, feasible.choice.experts) for name in names}


def thinner(feasible: Feasible) -> Feasible:
    """The answer itself where it drops experts; else one that does, because criteria cannot be told apart when all stay."""
    total, space = feasible.model.spec.moe.experts, feasible.space
    fewer = [count for count in feasible.demand.counts if count <= THINNER_SHARE * total]
    if not feasible.keeps_all or not fewer:
        return feasible
    return replace(feasible, choice=space.option(fewer[0], feasible.choice.packing))


@dataclass(frozen=True)
class Judged:
    """The candidates at one count of experts, and what masking them costs."""

    choices: dict[str, Kept]
    results: dict[str, MaskedKl]
    notes: list[str]
    asked: str  # plan.criterion

    @property
    def best(self) -> str:
        """The candidate with the least KL, or the criterion that was asked for."""
        return self.asked if self.asked in self.results else self.ranked[0][0]

    @property
    def best_nats(self) -> float:
        return self.results[self.best].kl_nats

    @property
    def ranked(self) -> list[tuple[str, float]]:
        """Names and masked KL, least first."""
        return sorted(((name, result.kl_nats) for name, result in self.results.items()), key=lambda pair: pair[1])

    @property
    def ranking(self) -> str:
        """The best criterion that ranks experts, whose choices at other counts are nested."""
        return next((name for name, _ in self.ranked if name not in (SEARCH, "random")), self.best)


@dataclass(frozen=True)
class Desk:
    """What candidates are made of and judged with."""

    config: BuildConfig
    chosen: Candidates
    teacher: Teacher
    rows: CalibrationRows
    _narrowings: dict[int, Narrowing] = field(default_factory=dict)  # by width
    _known: dict[Hashable, MaskedKl] = field(default_factory=dict)  # by shape, rows and choice

    def score(self, feasible: Feasible) -> Score:
        """Masked KL at the top-k and width of `feasible`; what has been measured before is not run again.

        Raises:
            ConfigError: narrower experts, and the profile has no sums of activations to choose neurons by.
        """
        top_k, width = student_top_k(feasible), feasible.space.width
        return partial(self._scored, (top_k, width), self.teacher.at(top_k, self._neurons(width)))

    def _scored(
        self, shape: Hashable, measure: Score, choices: Mapping[str, Kept], ids_NS: Tensor
    ) -> dict[str, MaskedKl]:
        rows = ids_NS.numpy().tobytes()
        keys = {name: (shape, rows, _frozen(kept)) for name, kept in choices.items()}
        new = {name: choices[name] for name, key in keys.items() if key not in self._known}
        found = measure(new, ids_NS) if new else {}
        self._known.update({keys[name]: result for name, result in found.items()})
        return {name: self._known[key] for name, key in keys.items()}

    def _neurons(self, width: int | None) -> NeuronMask | None:
        if width is None:
            return None
        sums_LEF = self.chosen.stats.imatrix.get("expert_down")
        if sums_LEF is None:
            raise ConfigError(
                "narrower experts need a profile with activations",
                where="plan.expert_width",
                why="the profile has no sums of squared activations to choose neurons by",
                next_command="moe-edge profile TEACHER --fresh",
            )
        return self._narrowings.setdefault(width, Narrowing(sums_LEF, width)).mask

    def judge(self, feasible: Feasible, *, searching: bool) -> Judged:
        """Every criterion's choice at the count of `feasible`, and the search's, masked on the judging rows."""
        asked, notes = self.config.plan.criterion, [self.rows.where, *self.chosen.notes()]
        choices = choose(feasible, self.config, self.chosen)
        score = self.score(feasible)
        judged = Judged(choices, dict(score(choices, self.rows.judged_NS)), notes, asked)
        if not searching or asked != AUTO:
            return judged
        start = judged.ranking
        found = self._search(feasible, choices[start])
        notes.append(self._search_note(found, start, choices[start]))
        if found is None:
            return judged
        results = score({SEARCH: found.kept}, self.rows.judged_NS)
        return Judged(choices | {SEARCH: found.kept}, judged.results | dict(results), notes, asked)

    def _search(self, feasible: Feasible, start: Kept) -> Found | None:
        """Swaps from a criterion's choice; None where it is off, impossible, or there are no rows for it. Narrower
        experts are not part of a search; what it finds is judged with them, like every other choice."""
        spec, settings, model = feasible.model.spec, self.config.plan, self.teacher.model
        if model is None or not settings.search_tokens or not len(self.rows.search_NS):
            return None
        return search(
            model,
            start,
            self.rows.search_NS,
            budget_tokens=settings.search_tokens,
            rules=Rules(
                student_top_k(feasible), spec.moe.groups, self.chosen.guard, spec.residual_scale, self.chosen.within
            ),
            seed=settings.seed,
        )

    def even_note(self, feasible: Feasible, judged: Judged) -> list[str]:
        """Where layers may be uneven: what equally many experts in each would lose, by the best ranking criterion."""
        if not self.chosen.uneven:
            return []
        name = judged.ranking
        even = replace(self.chosen, uneven=False).kept(name, feasible.choice.experts)
        nats = self.score(feasible)({name: even}, self.rows.judged_NS)[name].kl_nats
        return [
            f"By '{name}', uneven layers lose {judged.results[name].kl_nats:.3f} nats, as many experts in every layer "
            f"{nats:.3f} (plan.uneven=false)."
        ]

    def _search_note(self, found: Found | None, name: str, start: Kept) -> str:
        budget = self.config.plan.search_tokens
        if found is None and self.teacher.model is None:
            return "No search: the teacher does not fit in memory."
        if found is None:
            return f"No search: {'no calibration row is left for it' if budget else 'plan.search_tokens is 0'}."
        kept = sum(len(ids) for ids in start.values())
        return (
            f"'{SEARCH}' started from '{name}', the best criterion, and exchanged {found.swapped} of {kept} kept experts in "
            f"{found.sweeps} sweeps, for {found.tokens} of {budget} tokens of teacher work; it read the first "
            f"{len(self.rows.search_NS)} calibration rows and none of those that judge."
        )


def _frozen(kept: Kept) -> Hashable:
    return tuple((layer, tuple(ids)) for layer, ids in sorted(kept.items()))


def student_top_k(feasible: Feasible) -> int | None:
    """None where it is the teacher's."""
    return feasible.space.top_k if feasible.space.top_k != feasible.model.spec.moe.top_k else None


def honesty(best: str, results: dict[str, MaskedKl]) -> list[str]:
    """What the numbers do not support, said beside them."""
    chosen, chance = results[best], results.get("random")
    notes = []
    if chance is not None and best != "random" and not chosen.clearly_below(chance):
        numbers = f"{chosen.kl_nats:.3f} against {chance.kl_nats:.3f} nats"
        notes.append(f"'{best}' is not clearly better than a random choice on these rows ({numbers}).")
    if best == "random":
        notes.append("A random choice did best: no criterion describes this teacher's experts.")
    return notes
