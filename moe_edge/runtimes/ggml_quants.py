"""ggml's own quantization formats on arrays in memory: what a weight becomes in a GGUF file, without writing one.

What: `quantize_rows`, `dequantize_rows` and `round_trip`, over the C functions of the shared libraries inside
llama-cpp-python. Why: the plan measures what every type costs a model before anything is exported, with the very
bytes that llama.cpp's quantizer would write; the `gguf` package can read K-quants but not make them.
Declarations: ggml.h (ggml_quantize_chunk, ggml_get_type_traits) of the same installation.

Shape suffixes: R rows, N weights of a row (n_in), B bytes of a stored row.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import llama_cpp
import numpy as np

from moe_edge.contracts.quantization import GGML_TYPES, NEEDS_IMATRIX
from moe_edge.process.limits import available_cores
from moe_edge.runtimes.gguf_header import GGML_TYPE_IDS

ROWS_PER_TASK = 64  # quantized by one thread at a time
_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
        ("from_float_ref", ctypes.c_void_p),
    ]


@cache
def _library() -> ctypes.CDLL:
    """libggml-base with the few functions used here declared."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    names = [path for path in folder.glob("*ggml-base*") if path.suffix in (".so", ".dylib", ".dll")]
    library = ctypes.CDLL(str(sorted(names)[0]))
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    return library


@cache
def _traits(kind: str) -> _TypeTraits:
    traits: _TypeTraits = _library().ggml_get_type_traits(GGML_TYPE_IDS[kind]).contents
    expected = GGML_TYPES[kind]
    if (traits.blck_size, traits.type_size) != expected:
        raise RuntimeError(f"ggml stores {kind} in {(traits.blck_size, traits.type_size)}, the table says {expected}")
    return traits


def row_bytes(kind: str, row_length: int) -> int:
    """Stored bytes of one row. Raises ValueError when the row is no multiple of the type's block."""
    per_block, block_bytes = GGML_TYPES[kind]
    if row_length % per_block:
        raise ValueError(f"rows of {row_length} weights cannot be cut into {kind} blocks of {per_block}")
    return row_length // per_block * block_bytes


def quantize_rows(
    kind: str, rows_RN: np.ndarray, importance_N: np.ndarray | None = None, threads: int = 1
) -> np.ndarray:
    """The bytes [R, B] uint8 that llama.cpp's quantizer stores for float32 rows.

    Args:
        importance_N: mean square of every input column (an imatrix row), or None for unweighted quantization.
    """
    rows_RN = np.ascontiguousarray(rows_RN, dtype=np.float32)
    count, length = rows_RN.shape
    stored_RB = np.empty((count, row_bytes(kind, length)), dtype=np.uint8)
    if kind == "F32":
        return rows_RN.view(np.uint8)
    if importance_N is None and kind in NEEDS_IMATRIX:  # ggml would abort the process
        raise ValueError(f"{kind} needs an importance matrix")
    weights = None if importance_N is None else np.ascontiguousarray(importance_N, dtype=np.float32)
    if weights is not None and weights.shape != (length,):
        raise ValueError(f"{weights.shape} importances for rows of {length}")
    pointer, number = (None if weights is None else weights.ctypes.data), GGML_TYPE_IDS[kind]

    def work(start: int, stop: int) -> None:
        _library().ggml_quantize_chunk(
            number, rows_RN.ctypes.data, stored_RB.ctypes.data, start * length, stop - start, length, pointer
        )

    _in_parallel(work, count, threads)
    return stored_RB


def dequantize_rows(kind: str, stored_RB: np.ndarray, row_length: int, threads: int = 1) -> np.ndarray:
    """The float32 rows [R, N] that a runtime computes with."""
    stored_RB = np.ascontiguousarray(stored_RB, dtype=np.uint8)
    if stored_RB.shape[1] != row_bytes(kind, row_length):
        raise ValueError(f"{stored_RB.shape[1]} bytes per row are not {row_length} weights of {kind}")
    if kind == "F32":
        return stored_RB.view(np.float32)
    rows_RN = np.empty((len(stored_RB), row_length), dtype=np.float32)
    to_float, stored_bytes = _traits(kind).to_float, stored_RB.strides[0]

    def work(start: int, stop: int) -> None:
        source = stored_RB.ctypes.data + start * stored_bytes
        to_float(source, rows_RN.ctypes.data + 4 * start * row_length, (stop - start) * row_length)

    _in_parallel(work, len(stored_RB), threads)
    return rows_RN


def round_trip(kind: str, rows_RN: np.ndarray, importance_N: np.ndarray | None = None, threads: int = 1) -> np.ndarray:
    """Float32 rows [R, N] after being stored as `kind` and read again."""
    stored_RB = quantize_rows(kind, rows_RN, importance_N, threads)
    return dequantize_rows(kind, stored_RB, rows_RN.shape[1], threads)


def _in_parallel(work: Callable[[int, int], None], rows: int, threads: int) -> None:
    """work(start, stop) over all rows; the C functions run without Python's lock. Results do not depend on `threads`."""
    _library()  # loaded before the threads start
    bounds = [(start, min(start + ROWS_PER_TASK, rows)) for start in range(0, rows, ROWS_PER_TASK)]
    workers = min(threads, len(bounds), available_cores())
    if workers <= 1:
        for start, stop in bounds:
            work(start, stop)
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, *zip(*bounds, strict=True)))
