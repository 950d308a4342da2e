"""Tensors in safetensors files: a dictionary in one file, and checkpoints of models piece by piece.

`save_tensors` and `load_tensors` are for what moe-edge keeps between stages, and for the state that a run needs to go on.

`PieceReader` and `write_tensors` are for models that are larger than memory. Reading does not map the file: pages of a
mapped file count as memory of the process for as long as it is open, and that is what a limit on memory is about. Writing
gets every tensor's name, dtype and shape first, because a safetensors file begins with its header, and then the numbers in
pieces. The same tensors give the same bytes.

Format: see safetensors_header.py; folders as transformers writes them, `model.safetensors` or numbered shards with an
index.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_edge.contracts.checkpoint import CheckpointHeaders, TensorInfo
from moe_edge.contracts.errors import InputRejected
from moe_edge.storage.checkpoint import INDEX, SINGLE
from moe_edge.storage.files import Closing, write_json_atomic
from moe_edge.storage.mxfp4 import dequantize
from moe_edge.storage.safetensors_header import DTYPE_BYTES

PIECE_BYTES = 32 * 2**20
SHARD_BYTES = 4 * 10**9
TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "I64": torch.int64, "U64": torch.uint64,
    "F64": torch.float64,
}  # fmt: skip
HEADER_KEY = "moe-edge"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """A safetensors file with a JSON header, atomically: written as `path.tmp`, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary, metadata={HEADER_KEY: json.dumps(header, sort_keys=True)})
    os.replace(temporary, path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and the JSON header of a file that `save_tensors` wrote.

    Raises:
        InputRejected: missing, truncated or foreign file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # clone: the file may be replaced while its tensors are in use
            tensors = {name: torch.clone(file.get_tensor(name)) for name in file.keys()}
        return tensors, json.loads(metadata[HEADER_KEY])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputRejected("cannot read a moe-edge tensor file", where=str(path), why=str(error)) from error


def load_weights_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a file of weights without a header of ours, as transformers writes it into training checkpoints.

    Raises:
        InputRejected: no such file, or not a whole safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputRejected("a file of weights cannot be read", where=str(path), why=str(error)) from error


class PieceReader(Closing):
    """Reads rows of a checked folder's tensors; a context manager that closes the files.

    A "row" is everything under one index of the first axis; a tensor without axes is one row.
    """

    def __init__(self, headers: CheckpointHeaders) -> None:
        self.headers = headers
        self._open: dict[str, BufferedReader] = {}
        self._stack = ExitStack()

    def close(self) -> None:
        self._stack.close()
        self._open.clear()

    def info(self, name: str) -> TensorInfo:
        """Raises InputRejected when there is no tensor of this name."""
        if name not in self.headers.tensors:
            raise InputRejected("no such tensor", where=f"{self.headers.folder}: {name}")
        return self.headers.tensors[name]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop in the stored dtype, MXFP4 as bfloat16, in memory of their own.

        Raises:
            InputRejected: no such tensor, or the file has become shorter than its header says.
        """
        info = self.info(name)
        if info.packed is not None:
            parts = (info.packed.blocks, info.packed.scales)
            return dequantize(*(self._stored_rows(part, start, stop) for part in parts))
        return self._stored_rows(info, start, stop)

    def _stored_rows(self, info: TensorInfo, start: int, stop: int | None) -> Tensor:
        shape = info.shape or (1,)
        stop = shape[0] if stop is None else stop
        row_bytes = info.bytes // max(shape[0], 1)
        raw = bytearray((stop - start) * row_bytes)
        file = self._file(info.file)
        file.seek(info.offset + start * row_bytes)
        if file.readinto(raw) != len(raw):
            raise InputRejected("the file is truncated", where=f"{self.headers.folder / info.file}: {info.name}")
        if not raw:
            return torch.empty((stop - start, *shape[1:]), dtype=TORCH_DTYPES[info.dtype])
        values = torch.frombuffer(raw, dtype=TORCH_DTYPES[info.dtype])
        return values.view(stop - start, *shape[1:]) if info.shape else values.view(())

    def pieces(self, name: str, limit_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the whole tensor in turn, each of at most `limit_bytes` or one row."""
        info = self.info(name)
        count = info.shape[0] if info.shape else 1
        step = max(1, limit_bytes * count // max(info.bytes, 1))
        for start in range(0, count, step):
            yield start, self.rows(name, start, min(start + step, count))

    def _file(self, name: str) -> BufferedReader:
        if name not in self._open:
            self._open[name] = self._stack.enter_context((self.headers.folder / name).open("rb"))
        return self._open[name]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written."""

    name: str
    dtype: str  # as safetensors writes it: F32, BF16, ...
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


Pieces = Callable[[PlannedTensor], Iterator[Tensor]]  # the numbers of a tensor in order, in pieces of any shape


def write_tensors(
    folder: Path, tensors: Sequence[PlannedTensor], pieces: Pieces, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a checkpoint's weights into `folder`, one piece in memory at a time.

    Args:
        tensors: in the order of the files; a file is closed before it exceeds `shard_bytes`, unless one tensor does.

    Raises:
        ValueError: the pieces of a tensor do not add up to its shape.
    """
    shards = _shards(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        shard.sort(key=lambda tensor: -DTYPE_BYTES[tensor.dtype])  # keeps every tensor aligned to its item size
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, pieces)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.bytes for tensor in tensors)
        write_json_atomic(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Sequence[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _write_file(path: Path, tensors: Sequence[PlannedTensor], pieces: Pieces) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # readers map the data, which then begins at a multiple of eight
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            start = file.tell()
            for piece in pieces(tensor):
                file.write(piece.contiguous().flatten().view(torch.uint8).numpy().data)
            if file.tell() - start != tensor.bytes:
                raise ValueError(f"{tensor.name}: {file.tell() - start} bytes written, {tensor.bytes} planned")
