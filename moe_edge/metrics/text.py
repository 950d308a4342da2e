"""Scores of answers on an instruction set: ROUGE-L, BLEU, chrF, exact match, and BERTScore where an encoder is given.

Nothing is skipped and nothing divides by zero. An empty or broken answer is a row like any other and scores 0 everywhere;
skipping it would raise the mean. A row without a reference cannot be judged: it is left out and counted, or, for tasks
whose right answer may be nothing (`empty_references="score"`), scores 100 for an empty answer and else 0 (it adds
nothing to the corpus statistics of BLEU). A set without any reference is answered and counted; its scores are null with a reason.
Intervals resample rows, never answers: the answers of one row under several seeds are not independent.

Legend: R runs (one per seed), N rows, S statistics of BLEU.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moe_edge.contracts.errors import InputRejected
from moe_edge.metrics.quality import resampled_ci95
from moe_edge.metrics.text_answers import Answer, Status
from moe_edge.metrics.text_modules import compute, load_module
from moe_edge.texts.instruction_rows import InstructionRow

BOOTSTRAP_SAMPLES = 1000
NO_ROWS = "no row with a reference"
EmptyReferences = Literal["exclude", "score"]

# name of the module -> title; the order of every table
METRICS: dict[str, str] = {
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "exact_match": "exact match",
    "bertscore": "BERTScore",
}
DEFINITIONS = {
    "rouge_l": "F of the longest common subsequence, stemmed words, best reference, mean over rows, x100 (rouge_score)",
    "bleu": "corpus BLEU of a run on effective order, 13a tokens (sacrebleu); mean over runs",
    "chrf": "chrF2 of a row, best reference (sacrebleu); mean over rows",
    "exact_match": "equal to a reference without case and punctuation; mean over rows, x100",
    "bertscore": "F of the given encoder's last layer, best reference, not rescaled, mean over rows, x100 (bert_score)",
    "ci95": "percentile bootstrap over rows, all runs of a row together",
    "mean_nonempty": "mean over the answers that hold text; secondary, it hides empty answers",
    "std_over_seeds": "sample standard deviation of the runs' values",
    "distinct_4": "different 4-grams of tokens / all 4-grams of an answer; mean over answers of at least four tokens",
    "looping_tokens": "tokens of the longest tail that is one phrase at least twice in a row; mean over answers",
}


@dataclass(frozen=True)
class Scores:
    """One metric's scores of every judged row in every run."""

    rows_RN: np.ndarray
    statistics_RNS: np.ndarray | None = None
    corpus: Callable[[list[int]], float] | None = None

    def by_run(self, rows: np.ndarray) -> list[float]:
        """The value of each run over the rows at these indices (an index may come twice)."""
        if self.corpus is None or self.statistics_RNS is None:
            return [float(value) for value in self.rows_RN[:, rows].mean(axis=1)]
        return [self.corpus(sums_S) for sums_S in self.statistics_RNS[:, rows].sum(axis=1).tolist()]


def score_set(
    rows: Sequence[InstructionRow],
    answers: Mapping[str, Mapping[str, Answer]],
    options: Mapping[str, Mapping[str, Any]],
    empty_references: EmptyReferences = "exclude",
) -> dict[str, Any]:
    """Counts, metrics and categories of one set.

    Args:
        rows: the set.
        answers: run -> row_id -> answer; every run answers exactly the rows that can be judged.
        options: metric -> its module's options; the metrics to compute.
        empty_references: what a row without reference means.

    Raises:
        InputRejected: answers and rows do not match; names the rows.
    """
    judged = judged_rows(rows, empty_references)
    check_aligned(judged, answers)
    table = [[by_row[row.row_id] for row in judged] for by_row in answers.values()]
    scores = {name: _scores(name, judged, table, dict(options[name])) for name in METRICS if name in options}
    categories = sorted({row.category for row in judged if row.category is not None})
    kept = {row.row_id for row in judged}
    excluded = [row.row_id for row in rows if row.row_id not in kept]
    everything = np.arange(len(judged))
    scorable = empty_references == "score" or any(row.references for row in judged)
    result = _part(scores, table, everything, list(answers), scorable)
    result["counts"] |= {
        "n_rows": len(rows),
        "n_excluded_empty_reference": len(excluded),
        "excluded_rows": excluded,
        "n_outside_rouge": sum(not _rouge_can_read(row) for row in judged),
    }
    result["categories"] = {
        category: _part(
            scores, table, np.flatnonzero([row.category == category for row in judged]), list(answers), scorable
        )
        for category in categories
    }
    return result


def judged_rows(rows: Sequence[InstructionRow], empty_references: EmptyReferences) -> list[InstructionRow]:
    """The rows that need an answer: all of a set that has no reference at all, because what an artifact says still counts."""
    return [row for row in rows if row.references or empty_references == "score"] or list(rows)


def check_aligned(rows: Sequence[InstructionRow], answers: Mapping[str, Mapping[str, Answer]]) -> None:
    """Every run answers every row once and nothing else. Raises InputRejected with the rows' ids."""
    wanted = {row.row_id for row in rows}
    for run, by_row in answers.items():
        missing, foreign = sorted(wanted - by_row.keys()), sorted(by_row.keys() - wanted)
        if missing or foreign:
            why = f"without an answer: {missing[:5]}, without a row: {foreign[:5]}"
            what = f"{len(by_row)} answers for {len(wanted)} rows"
            raise InputRejected(what, where=f"run {run}", why=why)


def _scores(
    name: str, rows: Sequence[InstructionRow], table: Sequence[Sequence[Answer]], options: dict[str, Any]
) -> Scores:
    """Every run through one module; rows without reference get 100 for nothing and 0 for anything."""
    with_reference = [at for at, row in enumerate(rows) if row.references]
    references = [list(rows[at].references) for at in with_reference]
    rows_RN = np.array([[0.0 if answer.text else 100.0 for answer in run] for run in table])
    rows_RN = rows_RN.reshape(len(table), len(rows))
    statistics_RNS = None
    for run, answers in enumerate(table if with_reference else []):
        result = compute(name, [answers[at].text for at in with_reference], references, **options)
        rows_RN[run, with_reference] = result["scores"]
        if "statistics" in result:
            if statistics_RNS is None:
                statistics_RNS = np.zeros((*rows_RN.shape, len(result["statistics"][0])), dtype=np.int64)
            statistics_RNS[run, with_reference] = result["statistics"]
    corpus = load_module(name).corpus_bleu if statistics_RNS is not None else None
    return Scores(rows_RN, statistics_RNS, corpus)


def _part(
    scores: Mapping[str, Scores],
    table: Sequence[Sequence[Answer]],
    rows: np.ndarray,
    runs: Sequence[str],
    scorable: bool,
) -> dict[str, Any]:
    """Counts and metrics of some rows; without metrics where there is nothing to compare with."""
    answers = [run[at] for run in table for at in rows]
    filled_RN = np.array([[bool(run[at].text) for at in rows] for run in table], dtype=bool)
    filled_RN = filled_RN.reshape(len(table), len(rows))
    compared = rows if scorable else rows[:0]
    return {
        "counts": count(answers, len(rows)),
        "metrics": {name: summarise(one, compared, filled_RN, runs) for name, one in scores.items()},
    }


def summarise(scores: Scores, rows: np.ndarray, filled_RN: np.ndarray, runs: Sequence[str]) -> dict[str, Any]:
    """One metric over some rows; null with a reason where there is none."""
    if not len(rows) or not len(runs):
        return {
            "value": None,
            "ci95": None,
            "by_seed": {},
            "std_over_seeds": None,
            "mean_nonempty": None,
            "reason": NO_ROWS,
        }
    values = scores.by_run(rows)
    filled = scores.rows_RN[:, rows][filled_RN]

    def means(draws_BN: np.ndarray) -> list[float]:
        return [float(np.mean(scores.by_run(rows[drawn_N]))) for drawn_N in draws_BN]

    interval = resampled_ci95(len(rows), means, BOOTSTRAP_SAMPLES)
    return {
        "value": float(np.mean(values)),
        "ci95": None if interval is None else list(interval),
        "by_seed": dict(zip(runs, values, strict=True)),
        "std_over_seeds": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "mean_nonempty": float(filled.mean()) if filled.size else None,
        "reason": None,
    }


def count(answers: Sequence[Answer], n_rows: int) -> dict[str, Any]:
    """What became of the answers; rates are null where there is no answer."""
    n = len(answers)
    statuses = {status.value: sum(answer.status == status for answer in answers) for status in Status}
    n_empty = sum(not answer.text for answer in answers)
    n_truncated = sum(answer.finish == "length" for answer in answers)
    distinct = [answer.distinct_4 for answer in answers if answer.distinct_4 is not None]
    return {
        "n": n_rows,
        "n_answers": n,
        "statuses": statuses,
        "n_empty": n_empty,
        "empty_rate": n_empty / n if n else None,
        "n_truncated": n_truncated,
        "truncated_rate": n_truncated / n if n else None,
        "repeated_rate": statuses[Status.REPEATED] / n if n else None,
        "distinct_4": float(np.mean(distinct)) if distinct else None,
        "looping_tokens": float(np.mean([answer.looping_tokens for answer in answers])) if n else None,
        "mean_tokens": float(np.mean([answer.n_tokens for answer in answers])) if n else None,
        "reason": None if n else NO_ROWS,
    }


def _rouge_can_read(row: InstructionRow) -> bool:
    """False where no reference holds what ROUGE's tokenizer keeps."""
    return not row.references or any(char.isascii() and char.isalnum() for text in row.references for char in text)
