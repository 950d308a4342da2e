"""The header of one safetensors file, checked in full against the file before anything trusts it.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian length n, n bytes of JSON (name -> dtype,
shape, data_offsets), then the data without holes.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

from moe_edge.contracts.checkpoint import TensorInfo
from moe_edge.contracts.errors import InputRejected
from moe_edge.storage.files import refuse_lfs_pointer

HEADER_LIMIT_BYTES = 100_000_000
TENSOR_LIMIT = 1 << 18  # the largest checkpoints have some 100 000 tensors; a parsed entry takes a kilobyte
RANK_LIMIT = 8  # of a weight; a hostile header could otherwise ask for a product of millions of numbers
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name -> info of one file, in file order.

    Raises:
        InputRejected: a Git-LFS pointer, a truncated file, an absurd length or number of tensors, invalid JSON,
            duplicate names, unknown dtypes, or offsets that overlap, leave holes, or do not end at the file's end.
    """
    refuse_lfs_pointer(path)
    header, data_bytes = _load(path)
    header.pop("__metadata__", None)
    data_start = path.stat().st_size - data_bytes
    found = [_tensor(path, name, entry, data_start) for name, entry in header.items()]
    found.sort(key=lambda pair: pair[1:])
    position = 0
    for info, start, stop in found:
        if start != position:
            problem = "overlap" if start < position else "leave a hole"
            raise _bad(path, f"offsets {problem}: tensor {info.name} starts at {start}, expected {position}")
        position = stop
    if position != data_bytes:
        why = f"the header describes {position} bytes of data, the file has {data_bytes}"
        raise _bad(path, why, what="the file is truncated" if position > data_bytes else "the file is too long")
    return {info.name: info for info, _, _ in found}


def _load(path: Path) -> tuple[dict[str, Any], int]:
    """The parsed header and how many bytes of data follow it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size >= 8 and length > HEADER_LIMIT_BYTES:  # no download that stopped: no writer writes such a number
            raise _bad(path, f"header of {length} bytes, limit {HEADER_LIMIT_BYTES}")
        if size < 8 or 8 + length > size:
            raise _bad(path, f"header of {length} bytes, file of {size} bytes", what="the file is truncated")
        raw = file.read(length)
    if (tensors := raw.count(b"data_offsets")) > TENSOR_LIMIT or raw.count(b"[") > 4 * TENSOR_LIMIT:
        raise _bad(path, f"the header names {tensors} tensors or too many lists, limit {TENSOR_LIMIT}")
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _bad(path, "header is not an object")
    return header, size - 8 - length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate keys")
    return result


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> tuple[TensorInfo, int, int]:
    """One entry with its data offsets [start, stop)."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        item_bytes = DTYPE_BYTES[dtype]
    except (TypeError, KeyError, ValueError) as error:
        raise _bad(path, f"tensor {name}: bad entry ({error!r})") from error
    numbers = (*shape, start, stop)
    if len(shape) > RANK_LIMIT or any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
        raise _bad(path, f"tensor {name}: shape and offsets must be few, non-negative 64-bit integers")
    needed = prod(shape) * item_bytes
    if stop - start != needed:
        raise _bad(path, f"tensor {name}: {dtype} {list(shape)} needs {needed} bytes, offsets give {stop - start}")
    return TensorInfo(name, path.name, dtype, shape, needed, data_start + start), start, stop


def _bad(path: Path, why: str, what: str = "not a valid safetensors file") -> InputRejected:
    return InputRejected(what, where=str(path), why=why)
