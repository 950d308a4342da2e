"""A signal whose exception was swallowed is raised again at the next step of work."""

import io
import logging
import os
import signal
import sys
from collections.abc import Iterator

import pytest

from moe_edge.process.progress import ConsoleHandler, Terminated, handle_interrupts, raise_pending_interrupt, track


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handle_interrupts()
    yield
    handle_interrupts()
    for number, handler in before.items():
        signal.signal(number, handler)


class Swallows:
    """Its destructor runs when the signal comes: Python prints the exception there and goes on."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self._number)
        for _ in range(1000):  # long enough for the handler to run here
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("number", "kind"), ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)))
def test_the_next_step_of_work_raises_what_a_destructor_swallowed(number: int, kind: type[BaseException]) -> None:
    done = []
    with pytest.raises(kind):
        for item in track(range(5), "working"):
            done.append(item)
            if item == 2:
                Swallows(number)
    assert done == [0, 1, 2]


def test_without_a_signal_nothing_is_raised() -> None:
    raise_pending_interrupt()
    assert list(track(range(3), "working")) == [0, 1, 2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_line_stands_above_the_bar_and_steers_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich moves the bar away, writes the line, and draws the bar again below: no line holds both."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    handler = ConsoleHandler()
    for number in track(range(3), "working [on] \x1b]0;title\x07"):
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "line %d \x1b[2J\x9b31m", (number,), None))
    lines = [line for line in screen.getvalue().split("\n") if "line " in line]
    assert [line.rpartition("\x1b[2K")[2].strip() for line in lines] == [f"line {n} ?[2J?31m" for n in range(3)]
    assert "working [on]" in screen.getvalue() and "\x1b]0" not in screen.getvalue()
    assert sys.stderr is screen
