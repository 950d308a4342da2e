"""Cutting a GGUF file into parts for file systems and hubs with a largest file size; llama.cpp opens the first part.

What: `split_gguf`. The format is llama.cpp's own (tools/gguf-split): `NAME-00001-of-00003.gguf`, all metadata in the first
part, `split.no`, `split.count` and `split.tensors.count` in every one. Metadata and numbers are copied byte by byte. Every
part is written beside and renamed, the first one last, so that a killed split leaves no set that looks complete.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.units import format_bytes
from moe_edge.runtimes.gguf_header import GGML_TYPE_IDS, GgufHeader, GgufTensor, check_gguf_header, part_name

ALIGNMENT = 32
VERSION = 3
MAX_PARTS = 65535  # split.count is a uint16
COPY_BYTES = 16 << 20
_PREAMBLE = 24  # magic, version, number of tensors, number of keys
_SPLIT_KEYS = (("split.no", 2, "H"), ("split.count", 2, "H"), ("split.tensors.count", 5, "i"))  # name, type, format


def split_gguf(path: Path, limit: int) -> list[Path]:
    """Cut `path` into parts of at most `limit` bytes each and remove it; a smaller file stays as it is.

    Returns:
        The parts in order, or `path` alone.

    Raises:
        ConfigError: a single tensor or the metadata exceeds the limit, or there would be too many parts.
    """
    header = check_gguf_header(path)
    if header.file_bytes <= limit:
        return [path]
    groups = _groups(header, limit)
    parts = [path.with_name(part_name(path.stem, number, len(groups))) for number in range(len(groups))]
    with path.open("rb") as source:
        for number in reversed(range(len(groups))):
            partial = parts[number].with_name(parts[number].name + ".tmp")
            with partial.open("wb") as out:
                _write_part(source, out, header, groups[number], number, len(groups))
            os.replace(partial, parts[number])
    path.unlink()
    return parts


def _groups(header: GgufHeader, limit: int) -> list[list[GgufTensor]]:
    """The tensors of every part, in the file's order."""
    groups: list[list[GgufTensor]] = [[]]
    size = _PREAMBLE + header.metadata_bytes + 256
    for tensor in header.tensors.values():
        needed = _padded(tensor.bytes) + len(_record(tensor, 0))
        if groups[-1] and size + needed > limit:
            groups.append([])
            size = _PREAMBLE + 256  # the split's own keys and the padding before the numbers
        if size + needed > limit:
            why = f"'{tensor.name}' needs {format_bytes(size + needed)} in one file with what must stand before it"
            raise ConfigError(f"parts of {format_bytes(limit)} are too small", where="export.gguf.split_bytes", why=why)
        groups[-1].append(tensor)
        size += needed
    if len(groups) > MAX_PARTS:
        raise ConfigError(f"{len(groups)} parts are too many", where="export.gguf.split_bytes", why="GGUF has 65535")
    return groups


def _write_part(
    source: BinaryIO, out: BinaryIO, header: GgufHeader, tensors: list[GgufTensor], number: int, count: int
) -> None:
    first = number == 0
    keys = len(_SPLIT_KEYS) + (len(header.metadata) if first else 0)
    out.write(struct.pack("<4sIQQ", b"GGUF", VERSION, len(tensors), keys))
    if first:
        source.seek(_PREAMBLE)
        out.write(source.read(header.metadata_bytes))
    for (name, kind, code), value in zip(_SPLIT_KEYS, (number, count, len(header.tensors)), strict=True):
        out.write(_string(name) + struct.pack("<I" + code, kind, value))
    offset = 0
    for tensor in tensors:
        out.write(_record(tensor, offset))
        offset += _padded(tensor.bytes)
    out.write(bytes(_padded(out.tell()) - out.tell()))
    for tensor in tensors:
        source.seek(header.data_start + tensor.offset)
        for chunk in _chunks(source, tensor.bytes):
            out.write(chunk)
        out.write(bytes(_padded(tensor.bytes) - tensor.bytes))


def _chunks(source: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0:
        chunk = source.read(min(size, COPY_BYTES))
        size -= len(chunk)
        yield chunk


def _record(tensor: GgufTensor, offset: int) -> bytes:
    dims = tuple(reversed(tensor.shape))
    numbers = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, GGML_TYPE_IDS[tensor.kind], offset)
    return _string(tensor.name) + numbers


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
