"""Teacher logits in the plain layout that scripts exchange: HDF5 with the top-k of every position, nothing packed.

    values       [N, S, K] float16   log-probabilities (another tool may have written raw logits: only differences count)
    indices      [N, S, K] int32     ids of the vocabulary
    input_ids    [N, S]    int32     the tokens; other tools leave them out, then the rows must come from elsewhere
    tail_logmass [N, S, H] float16   log of the mass outside K at each of the attribute `temperatures`; only moe-edge
                                     writes it: without it the tail is lost

This costs 6 bytes per kept id, against about 3.4 in our own cache. Files from elsewhere are checked before use: no
external or soft links, no virtual data sets, and every row's numbers by the codec that will hold them.

Shape suffixes: N rows, S tokens of a row, K kept ids, H temperatures.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moe_edge.contracts.errors import InputRejected
from moe_edge.storage.files import Closing
from moe_edge.storage.logit_codec import Floats, Ints, RowCodec, TeacherRow

PLAIN_SCHEMA = "moe-edge/plain-logits@1"
OURS = ("input_ids", "tail_logmass")


def write_plain(path: Path, codec: RowCodec, rows: Iterable[tuple[np.ndarray, TeacherRow]], count: int) -> None:
    """Write rows (ids [S], what the teacher said) beside `path` and rename; without timestamps."""
    tokens, width = codec.sequence_length, len(codec.temperatures)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with h5py.File(beside, "w", libver=("v110", "v110")) as file:
        file.attrs["schema"], file.attrs["vocab"] = PLAIN_SCHEMA, codec.vocab
        file.attrs["temperatures"] = np.asarray(codec.temperatures, dtype=np.float64)

        def dataset(name: str, shape: tuple[int, ...], dtype: str) -> Any:
            options = {"chunks": (1, *shape), "compression": "gzip", "shuffle": True, "track_times": False}
            return file.create_dataset(name, (count, *shape), dtype, **options)

        values, indices = dataset("values", (tokens, codec.k), "<f2"), dataset("indices", (tokens, codec.k), "<i4")
        input_ids = dataset("input_ids", (tokens,), "<i4")
        tails = dataset("tail_logmass", (tokens, width), "<f2") if width else None
        for number, (ids_S, row) in enumerate(rows):
            values[number], indices[number], input_ids[number] = row.logprobs_SK, row.indices_SK, ids_S
            if tails is not None:
                tails[number] = row.tail_logmass_SH
    os.replace(beside, path)


class PlainLogits(Closing):
    """A file in the plain layout, opened for reading; a context manager.

    Raises:
        InputRejected: unreadable, or not of this layout.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise InputRejected("the file of logits cannot be read", where=str(path), why=str(error)) from error
        try:
            self._values, self._indices = self._dataset("values"), self._dataset("indices")
            found = [name for name in OURS if name in self._file]
            extra = {name: self._dataset(name) for name in found}
            self._check(extra)
        except BaseException:
            self._file.close()
            raise

    def _dataset(self, name: str) -> Any:
        link = self._file.get(name, getlink=True)
        item = self._file.get(name) if isinstance(link, h5py.HardLink) else None
        if not isinstance(item, h5py.Dataset) or item.is_virtual or item.external:
            why = f"expected a plain data set '{name}'; found {', '.join(self._file) or 'nothing'}"
            raise InputRejected("not a file of plain logits", where=str(self.path), why=why)
        return item

    def _check(self, extra: dict[str, Any]) -> None:
        shape, temperatures = self._values.shape, tuple(map(float, self._file.attrs.get("temperatures", ())))
        self.ids_NS: np.ndarray | None = None
        self._tails = extra.get("tail_logmass")
        self.temperatures = temperatures if self._tails is not None else ()
        expected = {"indices": shape, "input_ids": shape[:2], "tail_logmass": (*shape[:2], len(temperatures))}
        shapes = {"indices": self._indices.shape} | {name: item.shape for name, item in extra.items()}
        kinds = self._values.dtype.kind + self._indices.dtype.kind
        if len(shape) != 3 or 0 in shape or kinds not in ("fi", "fu"):
            why = f"values {shape} {self._values.dtype}, indices {self._indices.dtype}; expected [rows, tokens, k]"
            raise InputRejected("not a file of plain logits", where=str(self.path), why=why)
        if wrong := [
            f"{name} {shapes[name]}, expected {expected[name]}" for name in shapes if shapes[name] != expected[name]
        ]:
            raise InputRejected("the data sets do not fit together", where=str(self.path), why="; ".join(wrong))
        if "input_ids" in extra:
            self.ids_NS = extra["input_ids"][...].astype(np.int32)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, S, K)"""
        rows, tokens, k = self._values.shape
        return rows, tokens, k

    def row(self, number: int) -> tuple[Floats, Ints, Floats]:
        """(values [S, K] descending, ids [S, K], log tail masses [S, H] or [S, 0]) of a row.

        Raises:
            InputRejected: damaged, or an id occurs twice at a position.
        """
        try:
            values_SK = self._values[number].astype(np.float32)
            indices_SK = self._indices[number].astype(np.int64)
            tail_SH = np.zeros((len(values_SK), 0)) if self._tails is None else self._tails[number]
        except OSError as error:
            raise InputRejected("the file of logits is damaged", where=str(self.path), why=str(error)) from error
        if (np.diff(np.sort(indices_SK, axis=-1), axis=-1) == 0).any():
            raise InputRejected("an id occurs twice at a position", where=f"{self.path}, row {number}")
        order_SK = np.argsort(-values_SK, axis=-1, kind="stable")
        sorted_SK = [np.take_along_axis(column, order_SK, -1) for column in (values_SK, indices_SK)]
        return sorted_SK[0], sorted_SK[1], tail_SH.astype(np.float32)

    def close(self) -> None:
        self._file.close()
