"""evaluate.json as Markdown: one table of scores per set, one of what became of the answers, one per category."""

from collections.abc import Mapping
from typing import Any

from moe_edge.metrics.text import METRICS
from moe_edge.reporting.markdown import NOT_MEASURED, inert, number, table


def evaluation_text(result: Mapping[str, Any]) -> str:
    """The whole text."""
    protocol, artifact = result["protocol"], result["artifact"]
    names = [name for name in METRICS if name in result["average"]]
    how = "greedy" if protocol["temperature"] == 0 else f"sampled, T = {protocol['temperature']:g}"
    contract = "MiniLLM's contract" if protocol["is_minillm_contract"] else "not MiniLLM's contract"
    parts = [
        f"# {inert(artifact['path'])}: {result['verdict']}",
        f"{artifact['runtime']}, {how}, runs {', '.join(protocol['runs'])}, at most {protocol['max_prompt_tokens']} + "
        f"{protocol['max_new_tokens']} tokens ({contract}). Scores from 0 to 100, [95 % interval over rows].",
        table(["set", "rows", *(METRICS[name] for name in names)], _score_rows(result, names)),
        table(
            ["set", "answers", "empty", "truncated", "repeated", "decode errors", "exceptions", "distinct-4", "tokens"],
            [_count_row(name, one["counts"]) for name, one in result["sets"].items()],
        ),
    ]
    for name, one in result["sets"].items():
        if one["categories"]:
            header = [f"category of {inert(name)}", "rows", "empty", *(METRICS[metric] for metric in names)]
            parts.append(table(header, [_category_row(*item, names) for item in one["categories"].items()]))
    parts += ["\n".join(f"- {inert(line)}" for line in [*result["reasons"], *result["notes"]])]
    return "\n\n".join(part for part in parts if part)


def _score_rows(result: Mapping[str, Any], names: list[str]) -> list[list[str]]:
    rows = [
        [name, str(one["counts"]["n"]), *(_score(one["metrics"][metric]) for metric in names)]
        for name, one in result["sets"].items()
    ]
    if len(rows) > 1:
        rows.append(["average", "", *(number(result["average"][metric]["value"]) for metric in names)])
    return rows


def _score(metric: Mapping[str, Any]) -> str:
    if metric["value"] is None:
        return f"{NOT_MEASURED} ({metric['reason']})"
    text = f"{metric['value']:.2f}"
    if metric["ci95"]:
        text += f" [{metric['ci95'][0]:.2f}, {metric['ci95'][1]:.2f}]"
    return text


def _share(rate: float | None) -> str:
    return NOT_MEASURED if rate is None else f"{100 * rate:.1f} %"


def _count_row(name: str, counts: Mapping[str, Any]) -> list[str]:
    statuses = counts["statuses"]
    return [
        name, str(counts["n_answers"]), _share(counts["empty_rate"]), _share(counts["truncated_rate"]),
        _share(counts["repeated_rate"]), str(statuses["decode_error"]), str(statuses["exception"]),
        number(counts["distinct_4"]), number(counts["mean_tokens"]),
    ]  # fmt: skip


def _category_row(name: str, part: Mapping[str, Any], names: list[str]) -> list[str]:
    scores = (_score(part["metrics"][metric]) for metric in names)
    return [name, str(part["counts"]["n"]), _share(part["counts"]["empty_rate"]), *scores]
