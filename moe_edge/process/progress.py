"""Long work in steps: one progress bar for everything that takes longer than two seconds, and interrupts that cannot get lost.

`track` shows a rich bar with an ETA on a terminal, plain lines elsewhere; always on stderr, because stdout carries results
only.

Python raises the exception of Ctrl-C or SIGTERM wherever it happens to be; inside a callback of a native library, a
destructor or an import hook it is printed and forgotten, and the build would go on. So the signal is remembered as well, and
raised again at the next step of work: `track` and the stage runner call `raise_pending_interrupt`.
"""

import logging
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import NoReturn, TypeVar

from moe_edge.contracts.errors import visible

Item = TypeVar("Item")
PLAIN_INTERVAL_S = 10.0


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yield `items` while showing how far we are; `total` defaults to len(items) where it has one."""
    if total is None:
        total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    return _bar(items, label, total) if sys.stderr.isatty() else _lines(items, label, total)


def _bar(items: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for item in progress.track(items, total=total, description=escape(visible(label))):
            raise_pending_interrupt()
            yield item


def _lines(items: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    started = last = time.monotonic()
    for done, item in enumerate(items, 1):
        raise_pending_interrupt()
        yield item
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL_S:
            last = now
            print(_line(label, done, total, now - started), file=sys.stderr, flush=True)


def _line(label: str, done: int, total: int | None, elapsed_s: float) -> str:
    if not total:
        return f"{label}: {done} in {elapsed_s:.0f} s"
    return f"{label}: {done}/{total}, {elapsed_s / done * (total - done):.0f} s left"


class ConsoleHandler(logging.Handler):
    """Log lines on the stderr of the moment: above a bar that is shown, which takes stderr's place while it lasts."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; no character of it steers the terminal."""
        try:
            print(visible(self.format(record)), file=sys.stderr, flush=True)
        except Exception:  # as every handler of the standard library
            self.handleError(record)


class Terminated(BaseException):
    """SIGTERM, raised as an exception so that locks and temporary folders are released."""


_EXCEPTIONS: dict[int, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_pending: list[type[BaseException]] = []


def handle_interrupts() -> None:
    """Handle both signals from now on, as if none had come yet. Only in the main thread."""
    _pending.clear()
    for number in _EXCEPTIONS:
        signal.signal(number, _raise)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    _pending.append(_EXCEPTIONS[number])
    raise _EXCEPTIONS[number]


def raise_pending_interrupt() -> None:
    """Raise what a signal raised earlier, if it has been swallowed."""
    if _pending:
        raise _pending[-1]
