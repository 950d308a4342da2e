"""Judging the candidates of a plan: which rows judge, which the search may read, and what the numbers do not support.

Shape suffixes: N rows, S tokens of a row, L MoE layers, E experts, F their width.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from torch import Tensor

from moe_edge.compression.width import Narrowing
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.plan import KeptExperts
from moe_edge.contracts.spec import keepable_counts
from moe_edge.models.pruning import NeuronMask
from moe_edge.planning.allocation import BudgetAnswer
from moe_edge.planning.bits import Sensitivity
from moe_edge.planning.candidates import AUTO, SEARCH, Candidates, criteria_to_compare
from moe_edge.planning.curve import Curve, curve_counts, measure_curve
from moe_edge.planning.demand import earlier_plan
from moe_edge.planning.document import KEEP_ALL
from moe_edge.planning.scoring import JudgingRows, MaskedKl, Scorer, first_rows
from moe_edge.planning.search import SearchResult, SwapRules, search
from moe_edge.planning.sensitivity import sensitivity_of
from moe_edge.storage.statistics import Statistics

COMPARISON_SHARE = 0.75  # of the experts; at which criteria are compared where all of them may stay


def candidates_of(answer: BudgetAnswer, config: BuildConfig, statistics: Statistics) -> Candidates:
    """How experts are chosen for this model under this configuration.

    Raises:
        ConfigError: plan.within is no plan of this model.
    """
    spec, plan = answer.model.spec, config.plan
    within = earlier_plan(plan.within, spec).kept if plan.within else {}
    candidates = Candidates(statistics, spec.moe_layers, spec.moe.groups, plan.seed, plan.super_expert_guard, within)
    if not plan.uneven:
        return candidates
    possible, most = keepable_counts(spec, answer.space.top_k), answer.space.most_experts_of_a_layer(answer.choice)
    return replace(candidates, uneven=True, possible=possible, most=most)


def choices_of(answer: BudgetAnswer, config: BuildConfig, candidates: Candidates) -> dict[str, KeptExperts]:
    """The kept experts under every criterion (auto), or under the named one with `random` beside it.

    Raises:
        ConfigError: the named criterion needs CKA and the profile has none.
    """
    names = criteria_to_compare(config.plan.criterion, candidates.stats)
    return {name: candidates.kept(name, answer.choice.experts) for name in names}


def with_fewer_experts(answer: BudgetAnswer) -> BudgetAnswer:
    """The answer itself where it drops experts; else one that does, because criteria cannot be told apart when all stay."""
    total, space = answer.model.spec.moe.experts, answer.space
    fewer = [count for count in answer.demand.counts if count <= COMPARISON_SHARE * total]
    if not answer.keeps_all or not fewer:
        return answer
    return replace(answer, choice=space.option(fewer[0], answer.choice.packing))


@dataclass(frozen=True)
class Comparison:
    """The candidates at one count of experts, and what masking them costs."""

    choices: dict[str, KeptExperts]
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
    def best_criterion(self) -> str:
        """The best candidate that ranks experts, so that its choices at other counts are nested."""
        return next((name for name, _ in self.ranked if name not in (SEARCH, "random")), self.best)


def random_choice_notes(best: str, results: Mapping[str, MaskedKl]) -> list[str]:
    """Whether the numbers support the best candidate against a random choice, said beside them."""
    chosen, random = results[best], results.get("random")
    notes = []
    if random is not None and best != "random" and not chosen.clearly_below(random):
        numbers = f"{chosen.kl_nats:.3f} against {random.kl_nats:.3f} nats"
        notes.append(f"'{best}' is not clearly better than a random choice on these rows ({numbers}).")
    if best == "random":
        notes.append("A random choice did best: no criterion describes this teacher's experts.")
    return notes


@dataclass(frozen=True)
class CandidateJudge:
    """Measures candidates on the judging rows; nothing is run twice."""

    config: BuildConfig
    candidates: Candidates
    scorer: Scorer
    rows: JudgingRows
    _narrowings: dict[int, Narrowing] = field(default_factory=dict)  # by width
    _measured: dict[Hashable, MaskedKl] = field(default_factory=dict)  # by shape, rows and choice

    def compare(self, answer: BudgetAnswer, *, searching: bool) -> Comparison:
        """Every criterion's choice at the count of `answer`, and the search's, masked on the judging rows.

        Raises:
            ConfigError: as `choices_of` and `masked_kl`.
        """
        asked, judging_NS = self.config.plan.criterion, self.rows.judging_NS
        notes = [self.rows.note, *self.candidates.notes()]
        choices = choices_of(answer, self.config, self.candidates)
        comparison = Comparison(choices, self.masked_kl(answer, choices, judging_NS), notes, asked)
        if not searching or asked != AUTO:
            return comparison
        found, note = self._search(answer, comparison.best_criterion, choices[comparison.best_criterion])
        notes.append(note)
        if found is None:
            return comparison
        results = comparison.results | self.masked_kl(answer, {SEARCH: found.kept}, judging_NS)
        return Comparison(choices | {SEARCH: found.kept}, results, notes, asked)

    def curve(self, answer: BudgetAnswer, criterion: str, *, only_the_choice: bool = False) -> Curve:
        """Masked KL of a criterion's choices, or of KEEP_ALL, on the first judging rows (plan.curve_tokens).

        Args:
            only_the_choice: at the count of `answer` alone; else at the usual shares, too, that the model can keep.
        """
        spec, top_k, chosen = answer.model.spec, answer.space.top_k, answer.choice.experts
        counts = [chosen]
        if not only_the_choice:
            possible = keepable_counts(spec, top_k)
            counts = [count for count in curve_counts(spec.moe.experts, top_k, [chosen]) if count in possible]
        return measure_curve(
            partial(self.masked_kl, answer),
            criterion,
            partial(self.kept, answer, criterion),
            counts,
            first_rows(self.rows.judging_NS, self.config.plan.curve_tokens),
            experts_total=spec.moe.experts,
            top_k=top_k,
        )

    def kept(self, answer: BudgetAnswer, criterion: str, count: int) -> KeptExperts:
        """What a criterion keeps at a count; all experts under KEEP_ALL."""
        return answer.all_experts if criterion == KEEP_ALL else self.candidates.kept(criterion, count)

    def masked_kl(
        self, answer: BudgetAnswer, choices: Mapping[str, KeptExperts], ids_NS: Tensor
    ) -> dict[str, MaskedKl]:
        """Masked KL of named choices at the top-k and width of `answer`; what has been measured before is not run again.

        Raises:
            ConfigError: narrower experts, and the profile has no sums of activations to choose neurons by.
        """
        shape, rows = answer.space.shape, ids_NS.numpy().tobytes()
        neurons = None if shape.width is None else self._neurons(shape.width)
        keys: dict[str, Hashable] = {name: (shape, rows, _frozen(kept)) for name, kept in choices.items()}
        new = {name: choices[name] for name, key in keys.items() if key not in self._measured}
        if new:
            found = self.scorer.masked_kl(new, ids_NS, top_k=student_top_k(answer), neurons=neurons)
            self._measured.update({keys[name]: result for name, result in found.items()})
        return {name: self._measured[key] for name, key in keys.items()}

    @cached_property
    def sensitivity(self) -> Sensitivity | None:
        """What each storage type costs, measured on the first judging rows; None: priors must do."""
        imatrix = self.candidates.stats.imatrix
        return sensitivity_of(self.config, self.scorer.model, self.rows.judging_NS, imatrix)

    def even_layers_note(self, answer: BudgetAnswer, comparison: Comparison) -> list[str]:
        """Where layers may be uneven: what equally many experts in each would lose, by the best criterion."""
        if not self.candidates.uneven:
            return []
        name = comparison.best_criterion
        even = replace(self.candidates, uneven=False).kept(name, answer.choice.experts)
        nats = self.masked_kl(answer, {name: even}, self.rows.judging_NS)[name].kl_nats
        return [
            f"By '{name}', uneven layers lose {comparison.results[name].kl_nats:.3f} nats, as many experts in every layer "
            f"{nats:.3f} (plan.uneven=false)."
        ]

    def _neurons(self, width: int) -> NeuronMask:
        sums_LEF = self.candidates.stats.imatrix.get("expert_down")
        if sums_LEF is None:
            raise ConfigError(
                "narrower experts need a profile with activations",
                where="plan.expert_width",
                why="the profile has no sums of squared activations to choose neurons by",
                next_command="moe-edge profile TEACHER --fresh",
            )
        return self._narrowings.setdefault(width, Narrowing(sums_LEF, width)).mask

    def _search(self, answer: BudgetAnswer, criterion: str, start: KeptExperts) -> tuple[SearchResult | None, str]:
        """Swaps from a criterion's choice, and what is said about them; None where it is off or impossible.

        Narrower experts are not part of a search; what it finds is judged with them, like every other choice.
        """
        spec, settings, rows_NS = answer.model.spec, self.config.plan, self.rows.search_NS
        if self.scorer.model is None:
            return None, "No search: the teacher does not fit in memory."
        if not settings.search_tokens:
            return None, "No search: plan.search_tokens is 0."
        if not len(rows_NS):
            return None, "No search: no calibration row is left for it."
        rules = SwapRules(
            top_k=student_top_k(answer),
            groups=spec.moe.groups,
            guard=self.candidates.guard,
            residual_scale=spec.residual_scale,
            within=self.candidates.within,
        )
        found = search(
            self.scorer.model, start, rows_NS, budget_tokens=settings.search_tokens, rules=rules, seed=settings.seed
        )
        kept = sum(len(ids) for ids in start.values())
        return found, (
            f"'{SEARCH}' started from '{criterion}', the best criterion, and exchanged {found.swapped} of {kept} kept "
            f"experts in {found.sweeps} sweeps, for {found.tokens} of {settings.search_tokens} tokens of teacher work; it "
            f"read the first {len(rows_NS)} calibration rows and none of those that judge."
        )


def student_top_k(answer: BudgetAnswer) -> int | None:
    """None where it is the teacher's."""
    return answer.space.top_k if answer.space.top_k != answer.model.spec.moe.top_k else None


def _frozen(kept: KeptExperts) -> Hashable:
    return tuple((layer, tuple(ids)) for layer, ids in sorted(kept.items()))
