"""What everything that holds a file, a model or a process inherits: `with` closes it, whatever happens inside.

`contextlib.closing` does the same from outside, but every caller would have to remember it.
"""

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """Has a `close`, and calls it where a `with` block ends."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held; closing twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
