"""The importance matrix: from the profile's neutral sums to what llama.cpp's quantizer reads, and to its file format.

What: `imatrix_arrays` (mean square of every input column, per expert) and `write_imatrix_gguf` (the sums, for other
tools). The formula is in formulas/importance.py.
Legend: L layers, E experts, D model width, F expert width.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGUFWriter

from moe_edge.contracts.spec import ModelSpec, TensorClass
from moe_edge.export.gguf_layout import gguf_name
from moe_edge.formulas.importance import mean_squares
from moe_edge.storage.statistics import Statistics

CHUNK_TOKENS = 512

# statistics key -> the tensor classes whose input it describes
_DENSE: dict[str, tuple[TensorClass, ...]] = {
    "attention_in": ("attention_q", "attention_k", "attention_v"),
    "attention_o": ("attention_o",),
    "ffn_in": ("shared_gate", "shared_up"),
    "shared_down": ("shared_down",),
    "dense_in": ("dense_gate", "dense_up"),
    "dense_down": ("dense_down",),
}
_EXPERT: dict[str, tuple[TensorClass, ...]] = {
    "expert_in": ("expert_gate", "expert_up"),
    "expert_down": ("expert_down",),
}


class _Sums(NamedTuple):
    name: str  # of the GGUF tensor
    sums: np.ndarray  # float64 [experts or 1, columns]
    counts: np.ndarray  # float64 [experts or 1]


def imatrix_arrays(
    statistics_imatrix: Mapping[str, Any], spec: ModelSpec, kept: Mapping[int, list[int]] | None = None
) -> dict[str, np.ndarray]:
    """Mean squares per GGUF tensor, float32 [experts * columns] or [columns], all finite and positive.

    Args:
        statistics_imatrix: `Statistics.imatrix` of the teacher.
        spec: the model that is exported (its expert count is the kept one).
        kept: decoder layer -> kept expert ids of the teacher; None keeps all.
    """
    return {entry.name: _mean_squares(entry) for entry in _entries(statistics_imatrix, spec, kept)}


def write_imatrix_gguf(path: Path, statistics: Statistics, spec: ModelSpec) -> None:
    """Write the unpruned sums and counts in llama.cpp's imatrix format (tools/imatrix), deterministically."""
    temporary = path.with_name(path.name + ".tmp")
    writer = GGUFWriter(temporary, "imatrix")
    del writer.kv_data[0]["general.architecture"]  # llama.cpp's own files have none
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [str(statistics.meta.get("calibration_digest", "calibration"))])
    writer.add_uint32("imatrix.chunk_count", -(-statistics.tokens // CHUNK_TOKENS))
    writer.add_uint32("imatrix.chunk_size", CHUNK_TOKENS)
    for entry in sorted(_entries(statistics.imatrix, spec, None)):
        writer.add_tensor(f"{entry.name}.in_sum2", entry.sums.astype(np.float32))
        writer.add_tensor(f"{entry.name}.counts", entry.counts.astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


def _entries(imatrix: Mapping[str, Any], spec: ModelSpec, kept: Mapping[int, list[int]] | None) -> Iterator[_Sums]:
    numbers = {key: np.asarray(value, dtype=np.float64) for key, value in imatrix.items()}
    dense = numbers["dense_count"].reshape(1)
    for key, classes in _DENSE.items():
        for layer in range(spec.layers if key in numbers else 0):
            for tensor_class in classes:
                if _there(tensor_class, layer, spec):
                    yield _Sums(gguf_name(tensor_class, "weight", layer), numbers[key][layer][None], dense)
    for key, classes in _EXPERT.items():
        for position, layer in enumerate(spec.moe_layers):
            chosen = slice(None) if kept is None else kept[layer]
            for tensor_class in classes:
                sums, counts = numbers[key][position][chosen], numbers["expert_count"][position][chosen]
                yield _Sums(gguf_name(tensor_class, "weight", layer), sums, counts)
    if "head_in" in numbers:
        tied = spec.tied_embeddings
        for name in ("output.weight", *(("token_embd.weight",) if tied else ())):
            yield _Sums(name, numbers["head_in"][None], dense)


def _there(tensor_class: TensorClass, layer: int, spec: ModelSpec) -> bool:
    """Has this layer such a tensor? Shared experts stand beside routed ones, dense blocks in their place."""
    if tensor_class.startswith("dense"):
        return layer in spec.dense_layers
    return not tensor_class.startswith("shared") or (bool(spec.moe.shared_width) and layer not in spec.dense_layers)


def _mean_squares(entry: _Sums) -> np.ndarray:
    """Flat, as llama.cpp's quantizer reads them."""
    return mean_squares(torch.from_numpy(entry.sums), torch.from_numpy(entry.counts)).numpy().ravel()
