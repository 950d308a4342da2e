"""Pieces of Markdown that every page is made of: numbers, inert text, tables, lists, sections.

Names from outside (models, messages) are made inert: no table breaks, no HTML. What was not measured is printed as `n/a`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_edge.contracts.errors import visible

NOT_MEASURED = "n/a"


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """Significant digits, never scientific between 0.001 and 1e6; null is n/a."""
    if value is None:
        return NOT_MEASURED
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}{unit}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    text = f"{value:.{max(digits - whole, 0)}f}" if whole else f"{value:.{digits + 1}f}"
    return text + unit


def interval(limits: Sequence[float] | None) -> str:
    """A confidence interval in brackets; null is n/a."""
    return f"[{number(limits[0])}, {number(limits[1])}]" if limits else NOT_MEASURED


def percent(share: float | None) -> str:
    """A share as per cent; null is n/a."""
    return NOT_MEASURED if share is None else f"{100 * share:.1f} %"


def inert(value: Any) -> str:
    """Text for a table cell or a list item: one line, no HTML, no column break, nothing that steers a terminal."""
    text = visible(str(value)).replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(text.split()).replace("|", "\\|")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; the first column is text, the others are numbers. Without a row there is none."""
    body = ["| " + " | ".join(inert(cell) for cell in row) + " |" for row in rows]
    head = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*head, *body]) if body else ""


def bullets(lines: Iterable[Any], prefix: str = "") -> str:
    """A list of one-line items; empty without any."""
    return "\n".join(f"- {prefix}{inert(line)}" for line in lines)


def facts(known: Mapping[str, Any]) -> str:
    """Names and values in one line, without the unknown ones."""
    return "; ".join(f"{name} {inert(value)}" for name, value in known.items() if value is not None)


def paragraphs(*parts: str) -> str:
    """The parts that say something, an empty line between them."""
    return "\n\n".join(part for part in parts if part)


def section(heading: str, *parts: str) -> str:
    """A heading over `paragraphs`; empty where no part says anything."""
    text = paragraphs(*parts)
    return f"## {heading}\n\n{text}" if text else ""
