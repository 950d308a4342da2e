"""Float32 rows on disk for what does not fit into memory: written in order, read back by number.

The file is plain little-endian float32 without a header and lives only inside an unfinished stage folder; whoever
resumes checks with `complete` that it was written to its end. Rows are read and written plainly, not mapped, because
mapped pages count as memory of the process.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_edge.storage.closing import Closing

ITEM_BYTES = 4


class Spill(Closing):
    """Rows of one shape; a context manager.

    Args:
        path: the file.
        shape: of one row.
        write: begin the file anew, instead of reading what is there.
    """

    def __init__(self, path: Path, shape: Sequence[int], *, write: bool = False) -> None:
        self.shape = tuple(shape)
        self._file = path.open("wb" if write else "rb")

    def append(self, rows_NX: Tensor) -> None:
        """Write rows behind those that are there."""
        if tuple(rows_NX.shape[1:]) != self.shape:
            raise ValueError(f"rows of shape {self.shape} are kept here, not {tuple(rows_NX.shape[1:])}")
        self._file.write(np.ascontiguousarray(rows_NX.float().cpu().numpy(), dtype="<f4").data)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop, float32 in memory of their own. Raises EOFError when the file ends before."""
        size = prod(self.shape)
        self._file.seek(start * size * ITEM_BYTES)
        values = np.fromfile(self._file, dtype="<f4", count=(stop - start) * size)
        if values.size != (stop - start) * size:
            raise EOFError(f"{self._file.name} ends before row {stop}")
        return torch.from_numpy(values).view(stop - start, *self.shape)

    def close(self) -> None:
        self._file.close()


def complete(path: Path, rows: int, shape: Sequence[int]) -> bool:
    """Is there a file of exactly this many rows?"""
    return path.is_file() and path.stat().st_size == rows * prod(shape) * ITEM_BYTES
