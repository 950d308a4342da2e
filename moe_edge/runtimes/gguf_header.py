"""A bounded reader of GGUF headers, ours, so that no crafted file reaches a parser that trusts it.

What: magic, metadata and tensor table of a GGUF v2/v3 file, every count and offset checked against the file's size
before anything is read or allocated. Why: gguf 0.19's GGUFReader hangs on a 49-byte file that announces an array of
2^63 strings, and libllama aborts the process on some inconsistencies. Format: ggml/docs/gguf.md.
"""

import mmap
import re
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from moe_edge.contracts.errors import InputRejected

MAX_KEYS, MAX_TENSORS, MAX_ELEMENTS = 1 << 16, 1 << 18, 1 << 22
MAX_ALIGNMENT = 1 << 20
# value type -> struct format
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Every type of ggml's, so that files of other makers can be read too; what we write is in contracts/quantization.py.
GGML_TYPE_IDS = {kind.name: int(kind) for kind in GGMLQuantizationType}
_KINDS = {int(kind): kind for kind in GGMLQuantizationType}


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table; `shape` in numpy order (row length last), `offset` from the data section."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Everything before the data section."""

    metadata: dict[str, Any]
    metadata_bytes: int  # of all keys and values, which follow the first 24 bytes
    tensors: dict[str, GgufTensor]
    data_start: int
    file_bytes: int


@dataclass
class _Cursor:
    path: Path
    data: mmap.mmap
    at: int = 0
    elements_left: int = field(default=MAX_ELEMENTS)

    def refuse(self, why: str) -> NoReturn:
        raise InputRejected("not a valid GGUF file", where=f"{self.path} at byte {self.at}", why=why)

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        if self.at + size > len(self.data):
            self.refuse(f"the file ends here, {size} more bytes were announced")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if length > len(self.data) - self.at:
            self.refuse(f"a string of {length} bytes does not fit into the remaining {len(self.data) - self.at}")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", "replace")

    def array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind != _STRING and kind not in _SCALARS:
            self.refuse(f"an array of type {kind} is not allowed")
        code = _SCALARS.get(kind, "Q")  # a string takes at least the 8 bytes of its length
        smallest = struct.calcsize("<" + code)
        if count > (len(self.data) - self.at) // smallest:
            self.refuse(f"an array of {count} elements cannot fit into {len(self.data) - self.at} bytes")
        self.elements_left -= count
        if self.elements_left < 0:
            self.refuse(f"more than {MAX_ELEMENTS} array elements in the metadata")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        values = list(struct.unpack_from(f"<{count}{code}", self.data, self.at))
        self.at += count * smallest
        return values

    def value(self) -> Any:
        kind = self.scalar("I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            self.refuse(f"unknown value type {kind}")
        return self.scalar(_SCALARS[kind])


def part_name(stem: str, number: int, count: int) -> str:
    """The name of part `number` (from 0) of a split file: what llama.cpp derives from the first part's."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def parts_of(path: Path) -> list[Path]:
    """All files of a GGUF model, given its first: itself, or the parts that its name and metadata announce.

    Raises:
        InputRejected: `path` is a later part, or a part is missing.
    """
    match = re.fullmatch(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", path.name)
    count = int(match["count"]) if match else 0
    if match is None or not count:
        return [path]
    parts = [path.with_name(part_name(match["stem"], number, count)) for number in range(count)]
    if int(match["number"]) != 1:
        raise InputRejected("not the first part of a split GGUF", where=str(path), next_command=f"use {parts[0].name}")
    if missing := [part.name for part in parts if not part.is_file()]:
        raise InputRejected("a split GGUF is incomplete", where=str(path), why=f"missing: {', '.join(missing[:3])}")
    return parts


def check_gguf_header(path: Path) -> GgufHeader:
    """Parse and validate the header of `path` in bounded time and memory.

    Raises:
        InputRejected: missing or truncated file, wrong magic or version, counts or sizes that the file cannot hold,
            unknown tensor types, duplicate names, overlapping or misplaced tensors.
    """
    if not path.is_file():
        raise InputRejected("there is no GGUF file", where=str(path))
    size = path.stat().st_size
    if size < 24:
        raise InputRejected("not a valid GGUF file", where=str(path), why=f"{size} bytes are less than a header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(_Cursor(path, data))


def _parse(cursor: _Cursor) -> GgufHeader:
    if cursor.data[:4] != b"GGUF":
        cursor.refuse(f"the magic is {cursor.data[:4]!r}, expected b'GGUF'")
    cursor.at = 4
    version, n_tensors, n_keys = cursor.scalar("I"), cursor.scalar("Q"), cursor.scalar("Q")
    if version not in (2, 3):
        cursor.refuse(f"version {version} is not supported (2 or 3)")
    if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
        cursor.refuse(f"{n_tensors} tensors and {n_keys} keys are beyond {MAX_TENSORS} and {MAX_KEYS}")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string()
        if key in metadata:
            cursor.refuse(f"the key '{key[:80]}' appears twice")
        metadata[key] = cursor.value()
    metadata_bytes = cursor.at - 24
    rows = [_tensor_row(cursor) for _ in range(n_tensors)]
    tensors, start = _locate(cursor, metadata, rows)
    return GgufHeader(metadata, metadata_bytes, tensors, start, len(cursor.data))


def _tensor_row(cursor: _Cursor) -> GgufTensor:
    name, n_dims = cursor.string(), cursor.scalar("I")
    if not 1 <= n_dims <= 4:
        cursor.refuse(f"tensor '{name[:80]}' has {n_dims} dimensions")
    dims = [cursor.scalar("Q") for _ in range(n_dims)]
    number, offset = cursor.scalar("I"), cursor.scalar("Q")
    if number not in _KINDS:
        cursor.refuse(f"tensor '{name[:80]}' has the unsupported type {number}")
    kind = _KINDS[number].name
    per_block, block_bytes = GGML_QUANT_SIZES[_KINDS[number]]
    count = prod(dims)
    if not 0 < count < 1 << 48 or dims[0] % per_block:
        cursor.refuse(f"tensor '{name[:80]}' of type {kind} has the impossible shape {dims}")
    return GgufTensor(name, kind, tuple(reversed(dims)), offset, count // per_block * block_bytes)


def _locate(cursor: _Cursor, metadata: dict[str, Any], rows: list[GgufTensor]) -> tuple[dict[str, GgufTensor], int]:
    """The tensors by name and where their numbers start, once they lie one after the other, aligned, inside the file
    (what libllama demands)."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        cursor.refuse(f"general.alignment is {alignment!r}")
    pad = alignment - 1
    start, expected = (cursor.at + pad) & ~pad, 0
    for row in rows:
        if row.offset != expected:
            cursor.refuse(f"tensor '{row.name[:80]}' starts at {row.offset}, expected {expected}")
        expected = (row.offset + row.bytes + pad) & ~pad
        if start + row.offset + row.bytes > len(cursor.data):
            cursor.refuse(f"tensor '{row.name[:80]}' ends beyond the file's {len(cursor.data)} bytes")
    tensors = {row.name: row for row in rows}
    if len(tensors) != len(rows):
        cursor.refuse("two tensors have the same name")
    return tensors, start
