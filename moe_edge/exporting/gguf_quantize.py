"""Quantization by libllama with every tensor's type decided here, not by its heuristics.

What: `quantize_gguf`. Why pin: llama.cpp's mixtures look at the number of experts (8 is special), so "Q4_K_M" before and
after pruning would not be the same thing; the planner predicts bytes from the same table. The finished file is read back
and compared with the table. Its bytes depend on source, recipe and imatrix only, not on the number of threads.
"""

import ctypes
import os
import re
import shutil
from pathlib import Path

import numpy as np
from llama_cpp import llama_cpp as lib

from moe_edge.contracts.errors import ConfigError, InputRejected, ResourceProblem
from moe_edge.contracts.quantization import NEEDS_IMATRIX, RECIPES, Mix, pinned_type
from moe_edge.exporting.gguf_layout import class_of, layer_of
from moe_edge.runtimes.gguf_header import GGML_TYPE_IDS, GgufHeader, check_gguf_header
from moe_edge.runtimes.llama_cpp import last_errors, quiet_llama

MAX_BUFFER_BYTES = 512 << 20
# recipe -> llama_ftype: what general.file_type will say
FILE_TYPES = {
    "F32": 0, "Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18,
    "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 28, "IQ4_XS": 30, "MXFP4": 38,
}  # fmt: skip


def quantize_gguf(
    src: Path, dst: Path, recipe: str, imatrix: dict[str, np.ndarray] | None, threads: int, mix: Mix | None = None
) -> dict[str, str]:
    """Quantize the float16 GGUF `src` into `dst` under a recipe of contracts/quantization.py.

    Args:
        imatrix: mean squares per tensor name (`imatrix_arrays`), or None for unweighted quantization.
        mix: a plan's types per class and range of layers, instead of the recipe's.

    Returns:
        GGUF tensor name -> ggml type, as read back from the finished file.

    Raises:
        ConfigError: the recipe is unknown, or needs an importance matrix that is not there.
        InputRejected: `src` is not a GGUF of ours, an imatrix does not fit it, or llama.cpp refuses it.
        ResourceProblem: the disk is full.
    """
    header = check_gguf_header(src)
    wanted = pinned_types(header, recipe, mix)
    _check_imatrix(header, imatrix or {})
    _check_importance_is_there(wanted, imatrix or {}, recipe)
    partial = dst.with_name(dst.name + ".tmp")
    dst.parent.mkdir(parents=True, exist_ok=True)
    _check_disk(dst.parent, header)
    if recipe == "F16" and not mix:
        shutil.copyfile(src, partial)
    else:
        _run(src, partial, recipe, wanted, imatrix or {}, threads)
    actual = {name: tensor.kind for name, tensor in check_gguf_header(partial).tensors.items()}
    if actual != wanted:
        wrong = {name: (wanted.get(name), kind) for name, kind in actual.items() if wanted.get(name) != kind}
        raise InputRejected("llama.cpp chose other types than the recipe", where=str(partial), why=str(wrong)[:400])
    os.replace(partial, dst)
    return actual


def pinned_types(header: GgufHeader, recipe: str, mix: Mix | None = None) -> dict[str, str]:
    """The type that every tensor of a file gets under a recipe and a plan's mix."""
    if recipe not in RECIPES:
        raise ConfigError(f"unknown quantization '{recipe}'", why=f"known: {', '.join(RECIPES)}")
    return {
        name: pinned_type(recipe, class_of(name), tensor.shape[-1], layer_of(name), mix)
        for name, tensor in header.tensors.items()
    }


def _check_imatrix(header: GgufHeader, imatrix: dict[str, np.ndarray]) -> None:
    for name, values in imatrix.items():
        tensor = header.tensors.get(name)
        if tensor is None:
            continue
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        if values.size != experts * tensor.shape[-1] or not np.isfinite(values).all():
            why = f"expected {experts} x {tensor.shape[-1]} finite values, got {values.size}"
            raise InputRejected("the importance matrix does not fit the model", where=name, why=why)


def _check_importance_is_there(wanted: dict[str, str], imatrix: dict[str, np.ndarray], recipe: str) -> None:
    """llama.cpp itself stops in the middle of the file."""
    exempt = {"token_embd.weight", "output.weight"}
    bare = [
        name for name, kind in wanted.items() if kind in NEEDS_IMATRIX and name not in imatrix and name not in exempt
    ]
    if bare:
        raise ConfigError(
            f"{recipe} needs an importance matrix",
            where=bare[0],
            why=f"{wanted[bare[0]]} is garbage without one, and {len(bare)} tensors have none",
            next_command="moe-edge profile MODEL first, or another type: --set export.gguf.types=[Q2_K]",
        )


def _check_disk(folder: Path, header: GgufHeader) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < header.file_bytes:
        why = f"{free_bytes} bytes are free, up to {header.file_bytes} are needed"
        raise ResourceProblem("not enough disk for the quantized file", where=str(folder), why=why)


def _run(
    src: Path, dst: Path, recipe: str, wanted: dict[str, str], imatrix: dict[str, np.ndarray], threads: int
) -> None:
    params = lib.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.max_buf_size = threads, _file_type(recipe), MAX_BUFFER_BYTES
    params.token_embedding_type = GGML_TYPE_IDS[wanted["token_embd.weight"]]
    if "output.weight" in wanted:
        params.output_tensor_type = GGML_TYPE_IDS[wanted["output.weight"]]
    overrides, vectors = _overrides(wanted), {name: np.ascontiguousarray(v, np.float32) for name, v in imatrix.items()}
    matrix = _imatrix(vectors)
    params.tt_overrides = overrides
    if imatrix:
        params.imatrix = matrix
    quiet_llama()
    status = lib.llama_model_quantize(str(src).encode(), str(dst).encode(), ctypes.byref(params))
    if status != 0:
        raise InputRejected(f"llama.cpp could not quantize to {recipe}", where=str(src), why=last_errors())


def _file_type(recipe: str) -> int:
    """llama.cpp obeys the pinned types only where the file's own type is a quantized one: F16 with a mix goes as Q8_0."""
    return FILE_TYPES.get(recipe, FILE_TYPES["Q8_0"])


def _overrides(wanted: dict[str, str]) -> ctypes.Array[lib.llama_model_tensor_override]:
    """One anchored pattern per tensor (std::regex_search, first match wins), ended by an empty row."""
    rows = (lib.llama_model_tensor_override * (len(wanted) + 1))()
    for row, (name, kind) in zip(rows, wanted.items(), strict=False):
        row.pattern, row.type = f"^{re.escape(name)}$".encode(), GGML_TYPE_IDS[kind]
    return rows


def _imatrix(vectors: dict[str, np.ndarray]) -> ctypes.Array[lib.llama_model_imatrix_data]:
    """Rows that point into `vectors`, which the caller keeps alive; ended by an empty row."""
    rows = (lib.llama_model_imatrix_data * (len(vectors) + 1))()
    for row, (name, values) in zip(rows, vectors.items(), strict=False):
        row.name, row.size = name.encode(), values.size
        row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return rows
