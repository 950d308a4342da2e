"""An evaluation as Markdown: one table of scores per set, one of what became of the answers, one per category."""

from collections.abc import Sequence

from moe_edge.contracts.evaluation import AnswerCounts, CategoryScores, Evaluation, MetricScore
from moe_edge.metrics.text import METRICS
from moe_edge.reporting.markdown import NOT_MEASURED, bullets, inert, number, paragraphs, percent, table

_COUNTS = (
    "set",
    "answers",
    "empty",
    "truncated",
    "repeated",
    "decode errors",
    "exceptions",
    "distinct-4",
    "tokens",
)


def evaluation_text(result: Evaluation) -> str:
    """The whole text."""
    names = [name for name in METRICS if name in result.average]
    categories = [
        table(
            [f"category of {inert(name)}", "rows", "empty", *(METRICS[metric] for metric in names)],
            [_category_row(category, scores, names) for category, scores in one.categories.items()],
        )
        for name, one in result.sets.items()
    ]
    return paragraphs(
        f"# {inert(result.artifact.path)}: {result.verdict}",
        _how(result),
        table(["set", "rows", *(METRICS[name] for name in names)], _score_rows(result, names)),
        table(_COUNTS, [_count_row(name, one.counts) for name, one in result.sets.items()]),
        *categories,
        bullets([*result.reasons, *result.notes]),
    )


def _how(result: Evaluation) -> str:
    protocol = result.protocol
    drawn = "greedy" if protocol.temperature == 0 else f"sampled, T = {protocol.temperature:g}"
    contract = "MiniLLM's contract" if protocol.is_minillm_contract else "not MiniLLM's contract"
    return (
        f"{result.artifact.runtime}, {drawn}, runs {', '.join(protocol.runs)}, at most {protocol.max_prompt_tokens} + "
        f"{protocol.max_new_tokens} tokens ({contract}). Scores from 0 to 100, [95 % interval over rows]."
    )


def _score_rows(result: Evaluation, names: Sequence[str]) -> list[list[str]]:
    rows = [
        [name, str(one.counts.n), *(_score(one.metrics[metric]) for metric in names)]
        for name, one in result.sets.items()
    ]
    if len(rows) > 1:
        rows.append(["average", "", *(number(result.average[metric].value) for metric in names)])
    return rows


def _score(metric: MetricScore) -> str:
    if metric.value is None:
        return f"{NOT_MEASURED} ({metric.reason})"
    limits = f" [{metric.ci95[0]:.2f}, {metric.ci95[1]:.2f}]" if metric.ci95 else ""
    return f"{metric.value:.2f}{limits}"


def _count_row(name: str, counts: AnswerCounts) -> list[str]:
    return [
        name,
        str(counts.n_answers),
        percent(counts.empty_rate),
        percent(counts.truncated_rate),
        percent(counts.repeated_rate),
        str(counts.statuses["decode_error"]),
        str(counts.statuses["exception"]),
        number(counts.distinct_4),
        number(counts.mean_tokens),
    ]


def _category_row(category: str, scores: CategoryScores, names: Sequence[str]) -> list[str]:
    values = (_score(scores.metrics[metric]) for metric in names)
    return [category, str(scores.counts.n), percent(scores.counts.empty_rate), *values]
