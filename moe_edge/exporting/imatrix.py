"""The importance matrix: from the profile's neutral sums to what the quantizers of both formats read.

What: `dense_imatrix` (of a student in which the experts stand side by side); for GGUF `imatrix_arrays` (mean square of every
input column, per expert, as llama.cpp's quantizer reads it) and `write_imatrix_gguf` (the sums, for other tools); for ONNX
`Importance`, which our own quantizer asks for one matrix at a time. The formula for GGUF is in formulas/importance.py.

Keys are the neutral ones of the profile: of all decoder layers attention_in [A, D], attention_o, ffn_in, shared_down,
dense_in, dense_down; head_in; of the MoE layers expert_in [L, E, D] and expert_down [L, E, F] with expert_count [L, E].
In `Importance` an expert that saw few tokens borrows from its layer: (sum_e + a m) / (n_e + a) with m the layer's mean square
and a = 32 tokens, so that a never-routed expert is weighted by the layer's mean and not by noise.

Legend: L MoE layers, A all decoder layers, E experts, K kept experts, D model width, F expert width, C input columns.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGUFWriter

from moe_edge.contracts.spec import ModelSpec, TensorClass
from moe_edge.exporting.gguf_layout import gguf_name
from moe_edge.exporting.gguf_reorder import tile_value_heads
from moe_edge.formulas.importance import mean_squares
from moe_edge.storage.statistics import Statistics

CHUNK_TOKENS = 512
PRIOR_TOKENS = 32.0
FLOOR = 1e-3  # share of the mean importance that a dead column keeps
Key = tuple[TensorClass, str]

# statistics key -> the tensors whose input it describes
_DENSE: dict[str, tuple[Key, ...]] = {
    "attention_in": (
        ("attention_q", "weight"), ("attention_k", "weight"), ("attention_v", "weight"), ("attention_other", "q_a"),
        ("attention_other", "kv_a"), ("attention_other", "conv_in"), ("attention_other", "linear_qkv"),
        ("attention_other", "linear_gate"), ("attention_other", "linear_beta"), ("attention_other", "linear_decay"),
    ),
    "attention_o": (("attention_o", "weight"),),
    "attention_q_b": (("attention_other", "q_b"),),
    "attention_kv_b": (("attention_other", "v_b"),),  # keys read q there, which no pass has summed
    "conv_out": (("attention_other", "conv_out"),),
    "linear_out": (("attention_other", "linear_out"),),
    "ffn_in": (("shared_gate", "weight"), ("shared_up", "weight")),
    "shared_down": (("shared_down", "weight"),),
    "dense_in": (("dense_gate", "weight"), ("dense_up", "weight")),
    "dense_down": (("dense_down", "weight"),),
}  # fmt: skip
_EXPERT: dict[str, tuple[Key, ...]] = {
    "expert_in": (("expert_gate", "weight"), ("expert_up", "weight")),
    "expert_down": (("expert_down", "weight"),),
}
# a dense layer's block is named as a shared expert is
_NAME_IN_DENSE_LAYERS = {"ffn_in": "dense_in", "shared_down": "dense_down"}


class _Sums(NamedTuple):
    name: str  # of the GGUF tensor
    sums: np.ndarray  # float64 [experts or 1, columns]
    counts: np.ndarray  # float64 [experts or 1]


def imatrix_arrays(
    statistics_imatrix: Mapping[str, Any], spec: ModelSpec, kept: Mapping[int, Sequence[int]] | None = None
) -> dict[str, np.ndarray]:
    """Mean squares per GGUF tensor, float32 [experts * columns] or [columns], all finite and positive.

    Args:
        statistics_imatrix: `Statistics.imatrix` of the teacher.
        spec: the model that is exported (its expert count is the kept one).
        kept: decoder layer -> kept expert ids of the teacher; None keeps all.
    """
    return {entry.name: _mean_squares(entry) for entry in _entries(statistics_imatrix, spec, kept)}


def dense_imatrix(
    imatrix: Mapping[str, torch.Tensor], spec: ModelSpec, kept: Mapping[int, Sequence[int]] | None
) -> dict[str, torch.Tensor]:
    """The sums of a student with one network per layer, from those of a teacher without dense layers.

    Every token passes the network, whose inner columns are those of the kept experts (and of the shared expert, where
    it joined them) side by side: each keeps the mean square that it had on the tokens of its expert.

    Args:
        spec: the student's, a dense class or one with a single expert.
        kept: decoder layer -> the teacher's experts that the network consists of; None = all.
    """
    count, dense = imatrix["dense_count"].double(), not spec.moe_layers
    layers = list(spec.moe_layers or range(spec.layers))
    energy_LF = []
    for layer, sums_EF, count_E in zip(layers, imatrix["expert_down"], imatrix["expert_count"], strict=True):
        chosen = slice(None) if kept is None else list(kept[layer])
        columns = [(mean_squares(sums_EF, count_E)[chosen].double() * count).flatten()]
        if dense and "shared_down" in imatrix:
            columns.append(imatrix["shared_down"][layer].double())
        energy_LF.append(torch.cat(columns))
    own = {name: sums for name, sums in imatrix.items() if name not in _EXPERT and name != "expert_count"}
    inside_LF = torch.stack(energy_LF)
    fits = inside_LF.shape[1] == (
        spec.dense_width if dense else spec.moe.expert_width
    )  # narrowed ones: unknown columns
    if dense:
        own["dense_in"] = own.pop("ffn_in")
        return own | ({"dense_down": inside_LF} if fits else {})
    own |= {"expert_in": own["ffn_in"][layers][:, None], "expert_count": count.expand(len(layers), 1)}
    return own | ({"expert_down": inside_LF[:, None]} if fits else {})


def write_imatrix_gguf(path: Path, statistics: Statistics, spec: ModelSpec) -> None:
    """Write the unpruned sums and counts in llama.cpp's imatrix format (tools/imatrix), deterministically."""
    temporary = path.with_name(path.name + ".tmp")
    writer = GGUFWriter(temporary, "imatrix")
    del writer.kv_data[0]["general.architecture"]  # llama.cpp's own files have none
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [str(statistics.meta.get("calibration_digest", "calibration"))])
    writer.add_uint32("imatrix.chunk_count", -(-statistics.tokens // CHUNK_TOKENS))
    writer.add_uint32("imatrix.chunk_size", CHUNK_TOKENS)
    for entry in sorted(_entries(statistics.imatrix, spec, None), key=lambda entry: entry.name):
        writer.add_tensor(f"{entry.name}.in_sum2", entry.sums.astype(np.float32))
        writer.add_tensor(f"{entry.name}.counts", entry.counts.astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


def _entries(imatrix: Mapping[str, Any], spec: ModelSpec, kept: Mapping[int, Sequence[int]] | None) -> Iterator[_Sums]:
    numbers = {key: np.asarray(value, dtype=np.float64) for key, value in imatrix.items()}
    dense = numbers["dense_count"].reshape(1)
    for key, tensors in _DENSE.items():
        for layer in range(spec.layers if key in numbers else 0):
            for tensor in tensors:
                if _there(tensor, layer, spec):
                    columns = _as_stored(numbers[key][layer], tensor[1], spec)
                    yield _Sums(gguf_name(*tensor, layer, spec.family), columns, np.repeat(dense, len(columns)))
    for key, tensors in _EXPERT.items():
        for position, layer in enumerate(spec.moe_layers if key in numbers else ()):
            chosen = slice(None) if kept is None else list(kept[layer])
            for tensor in tensors:
                sums, counts = numbers[key][position][chosen], numbers["expert_count"][position][chosen]
                yield _Sums(gguf_name(*tensor, layer, spec.family), sums, counts)
    if "head_in" in numbers:
        for name in ("output.weight", *(("token_embd.weight",) if spec.tied_embeddings else ())):
            yield _Sums(name, numbers["head_in"][None], dense)


def _as_stored(columns: np.ndarray, part: str, spec: ModelSpec) -> np.ndarray:
    """Columns [N] as the file's matrix has them, [matrices, N]."""
    if part == "v_b":
        return np.tile(columns, (spec.heads, 1))  # every head reads the latent
    return (tile_value_heads(columns, spec) if part == "linear_out" else columns)[None]


def _there(tensor: Key, layer: int, spec: ModelSpec) -> bool:
    """Has this layer such a tensor? Shared experts stand beside routed ones, dense blocks in their place."""
    tensor_class, part = tensor
    if tensor_class.startswith("dense"):
        return layer in spec.dense_layers
    if tensor_class.startswith("shared"):
        return bool(spec.moe.shared_width) and layer not in spec.dense_layers
    kind = spec.kind_of(layer)
    if part.startswith(("conv", "linear")):
        return part.startswith(kind)
    if kind in ("conv", "linear"):
        return False
    if part in ("q_a", "q_b"):
        return spec.latent is not None and spec.latent.q_rank is not None
    if part in ("kv_a", "v_b"):
        return spec.latent is not None
    return (
        spec.latent is None
        or tensor_class == "attention_o"
        or (tensor_class == "attention_q" and spec.latent.q_rank is None)
    )


def _mean_squares(entry: _Sums) -> np.ndarray:
    """Flat, as llama.cpp's quantizer reads them."""
    return mean_squares(torch.from_numpy(entry.sums), torch.from_numpy(entry.counts)).numpy().ravel()


class Importance:
    """Importance of a matrix's input columns for the ONNX quantizer; knows which teacher experts the student kept."""

    def __init__(
        self,
        imatrix: Mapping[str, Any] | None,
        kept: Mapping[int, list[int]] | None = None,
        moe_layers: Sequence[int] | None = None,
    ) -> None:
        """`kept` and `moe_layers` (None: all) are decoder layers."""
        self._sums = {key: torch.as_tensor(value).double() for key, value in (imatrix or {}).items()}
        self._kept = dict(kept or {})
        self._position = None if moe_layers is None else {layer: at for at, layer in enumerate(moe_layers)}

    def of(self, key: str | None, layer: int | None, expert: int | None = None) -> torch.Tensor | None:
        """Importance [1, C] with mean 1 of a matrix's columns, or None where the profile has nothing to say.

        Args:
            expert: position of the expert in the student, for the per-expert keys.
        """
        if key is not None and layer is not None and self._position is not None and layer not in self._position:
            key = _NAME_IN_DENSE_LAYERS.get(key, key)
        if key is None or key not in self._sums:
            return None
        sums = self._sums[key]
        if expert is not None and layer is not None:
            column = self._expert(sums, layer, expert)
        else:
            column = sums if layer is None or sums.dim() == 1 else sums[layer]
        mean = column.mean()
        if not torch.isfinite(mean) or mean <= 0:
            return None
        return (column / mean).clamp(min=FLOOR).float().unsqueeze(0)

    def _expert(self, sums_LEC: torch.Tensor, layer: int, expert: int) -> torch.Tensor:
        position = layer if self._position is None else self._position[layer]
        sums_EC = sums_LEC[position]
        teacher_id = self._kept[layer][expert] if layer in self._kept else expert
        if "expert_count" not in self._sums:
            return sums_EC[teacher_id]
        count_E = self._sums["expert_count"][position]
        mean_C = sums_EC.sum(0) / count_E.sum().clamp(min=1)
        return (sums_EC[teacher_id] + PRIOR_TOKENS * mean_C) / (count_E[teacher_id] + PRIOR_TOKENS)
