"""Text that goes round in circles: the failure of pruned models that write on their own (arXiv:2607.13124).

Shape suffixes: N tokens of a text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class RepeatedSuffix(NamedTuple):
    """The end of a text that only says again what stands before it."""

    length: int  # tokens that equal those one period earlier; 0: nothing is repeated
    period: int  # tokens of what is repeated; 0 where nothing is

    def share(self, tokens: int) -> float:
        """Of a text of so many tokens."""
        return self.length / tokens if tokens else 0.0


def repeated_suffix(ids_N: Sequence[int] | np.ndarray) -> RepeatedSuffix:
    """The longest end of the text that repeats what came one period before, at least one whole period of it.

    "a b c b c b c" ends in two repetitions of "b c": length 4, period 2. Cutting the last `length` tokens leaves the first
    copy. Of equally long ones the shortest period is named.
    """
    ids = np.asarray(ids_N)
    best = RepeatedSuffix(0, 0)
    for period in range(1, len(ids) // 2 + 1):
        differs = np.flatnonzero(ids[period:] != ids[:-period])
        length = len(ids) - period - (int(differs[-1]) + 1 if len(differs) else 0)
        if length >= period and length > best.length:
            best = RepeatedSuffix(length, period)
    return best
