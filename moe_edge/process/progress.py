"""One progress bar for everything that takes longer than two seconds: rich with an ETA on a terminal, plain lines elsewhere.

Always on stderr, because stdout carries results only.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_edge.process.interrupts import check

Item = TypeVar("Item")
PLAIN_INTERVAL_S = 10.0


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yield `items` while showing how far we are; `total` defaults to len(items) where it has one."""
    if total is None:
        total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    return _bar(items, label, total) if sys.stderr.isatty() else _lines(items, label, total)


def _bar(items: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for item in progress.track(items, total=total, description=label):
            check()
            yield item


def _lines(items: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    started = last = time.monotonic()
    for done, item in enumerate(items, 1):
        check()
        yield item
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL_S:
            last = now
            print(_line(label, done, total, now - started), file=sys.stderr, flush=True)


def _line(label: str, done: int, total: int | None, elapsed_s: float) -> str:
    if not total:
        return f"{label}: {done} in {elapsed_s:.0f} s"
    return f"{label}: {done}/{total}, {elapsed_s / done * (total - done):.0f} s left"
