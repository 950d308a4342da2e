"""Ctrl-C and SIGTERM that cannot get lost.

Python raises the signal's exception wherever it happens to be; inside a callback of a native library, a destructor or an
import hook it is printed and forgotten, and the build would go on. So the signal is remembered as well, and raised again at the
next step of work: progress bars and the stage runner ask for it.
"""

import signal
from types import FrameType
from typing import NoReturn


class Terminated(BaseException):
    """SIGTERM, raised as an exception so that locks and temporary folders are released."""


_KINDS: dict[int, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_pending: list[type[BaseException]] = []


def install() -> None:
    """Handle both signals from now on, as if none had come yet. Only in the main thread."""
    _pending.clear()
    for number in _KINDS:
        signal.signal(number, _raise)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    _pending.append(_KINDS[number])
    raise _KINDS[number]


def check() -> None:
    """Raise what a signal raised earlier, if it has been swallowed."""
    if _pending:
        raise _pending[-1]
