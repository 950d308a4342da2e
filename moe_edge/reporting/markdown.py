"""Small pieces of Markdown: numbers, inert text, tables."""

from collections.abc import Iterable, Sequence
from typing import Any

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


def inert(value: Any) -> str:
    """Text for a table cell or a list item: one line, no HTML, no column break."""
    text = str(value).replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(text.split()).replace("|", "\\|")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(inert(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
