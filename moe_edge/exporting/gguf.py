"""The GGUF writer: a Hugging Face MoE checkpoint to one float16 .gguf, one tensor in memory at a time.

What: `write_gguf`. Weights become float16, norms, routers and biases float32; the tokenizer is checked against
transformers before the file gets its name. Why our own: llama.cpp's converter is not on PyPI, writes no output.weight
for tied Qwen2-MoE (that file does not load), and converts without a word a config whose normalisation it cannot express.
The bytes depend on the checkpoint and the arguments only. Legend: E experts, F expert width, D model width.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter, LlamaFileType

from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.quantization import ALWAYS_F32
from moe_edge.contracts.spec import ModelSpec, TensorEntry
from moe_edge.exporting.gguf_hyperparameters import hyperparameters
from moe_edge.exporting.gguf_layout import LAYOUTS, StoredTensor, architecture_of, file_entries, stored_tensors
from moe_edge.exporting.gguf_tokenizer import gguf_vocabulary, verify_tokenizer, write_vocabulary
from moe_edge.families import student_family
from moe_edge.models.weight_sources import assemble
from moe_edge.process.progress import track
from moe_edge.runtimes.gguf_header import check_gguf_header
from moe_edge.storage.checkpoint import TensorReader, inspect_checkpoint

__all__ = ["check_gguf_header", "write_gguf"]
logging.getLogger("gguf").setLevel(logging.WARNING)
# llama.cpp computes the sigmoid of the shared gate as silu(x) / x, which is 0/0 for a gate that is exactly zero.
SMALLEST_GATE = 1e-12
CAST_ELEMENTS = 1 << 22  # converted at once
MAPPED_BYTES = 128 << 20  # pages of the checkpoint that may stay mapped between two tensors
_STANDARD_KEYS = {"license": "general.license", "description": "general.description", "author": "general.author"}


def write_gguf(
    checkpoint: Path,
    out: Path,
    *,
    name: str,
    pre_tokenizer: str | None = None,
    provenance: dict[str, str] | None = None,
) -> None:
    """Write `checkpoint` (a transformers folder) as the float16 GGUF file `out`.

    Args:
        name: general.name.
        pre_tokenizer: override of tokenizer.ggml.pre (config key export.gguf.pre_tokenizer).
        provenance: facts for the metadata; `base_model`, `license`, `author`, `description` get their standard keys,
            any other key becomes `moe_edge.<key>`.

    Raises:
        ConfigError: no such folder.
        InputRejected: corrupt checkpoint, a model that llama.cpp would compute differently, an unknown tokenizer,
            or weights beyond float16.
    """
    headers = inspect_checkpoint(checkpoint)
    family = student_family(headers.config)
    spec = family.spec(headers.config)
    architecture = architecture_of(spec)
    entries = file_entries(family.tensors(headers.config, headers.tensors), spec)
    partial = out.with_name(out.name + ".tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(partial, architecture)
    try:
        _write_metadata(writer, name, provenance or {})
        hyperparameters(writer, spec)
        for write in LAYOUTS[spec.family].writes:
            write(writer, spec)
        write_vocabulary(writer, gguf_vocabulary(checkpoint, spec.vocab, pre_tokenizer))
        _write_tensors(writer, checkpoint, entries, spec)
    finally:
        writer.close()
    check_gguf_header(partial)
    verify_tokenizer(partial, checkpoint)
    os.replace(partial, out)


def _write_metadata(writer: GGUFWriter, name: str, provenance: dict[str, str]) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    if "base_model" in provenance:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, provenance["base_model"])
    for key in sorted(provenance.keys() - {"base_model"}):
        writer.add_string(_STANDARD_KEYS.get(key, f"moe_edge.{key}"), provenance[key])


def _write_tensors(writer: GGUFWriter, checkpoint: Path, entries: list[TensorEntry], spec: ModelSpec) -> None:
    """The tensor table first, then the numbers, streamed."""
    tensors = [stored for entry in entries for stored in stored_tensors(entry, spec)]
    for stored in tensors:
        dtype = _dtype(stored.entry)
        size = int(np.prod(stored.shape, dtype=np.int64)) * dtype.itemsize
        writer.add_tensor_info(stored.name, stored.shape, dtype, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    reader, mapped_bytes = TensorReader(checkpoint), 0
    for stored in track(tensors, "GGUF F16", total=len(tensors)):
        mapped_bytes += sum(reader.headers.tensors[source].bytes for source in stored.entry.sources)
        if mapped_bytes > MAPPED_BYTES:  # a fresh reader gives the pages of the mapped checkpoint back
            reader, mapped_bytes = TensorReader(checkpoint), 0
        writer.write_tensor_data(_converted(stored, reader))


def _dtype(entry: TensorEntry) -> np.dtype:
    return np.dtype(np.float32 if entry.tensor_class in ALWAYS_F32 else np.float16)


def _converted(stored: StoredTensor, reader: TensorReader) -> np.ndarray:
    """One tensor as it lies in the file; experts are converted one by one. Without sources, `convert` makes it."""
    entry = stored.entry
    out = np.zeros(entry.shape, dtype=_dtype(entry))
    for expert, part in _parts(entry):
        _fill(out if expert is None else out[expert : expert + 1], assemble(part, reader), part)
    if entry.tensor_class == "shared_router" and not out.any():
        out[:] = SMALLEST_GATE
    return np.ascontiguousarray(stored.convert(out).reshape(stored.shape))


def _parts(entry: TensorEntry) -> Iterator[tuple[int | None, TensorEntry]]:
    """The whole entry, or one piece per expert where the checkpoint names experts one by one."""
    if len(entry.sources) == 1:
        yield None, entry
        return
    for expert, source in enumerate(entry.sources):
        yield expert, replace(entry, sources=(source,), shape=(1, *entry.shape[1:]))


def _fill(out: np.ndarray, tensor: torch.Tensor, entry: TensorEntry) -> None:
    """Copy `tensor` into `out` in its dtype, some rows at a time, refusing what the dtype cannot hold."""
    rows = max(1, CAST_ELEMENTS * len(tensor) // tensor.numel())
    for start in range(0, len(tensor), rows):
        piece = tensor[start : start + rows]
        out[start : start + rows] = piece.to(torch.float32 if out.dtype == np.float32 else torch.float16).numpy()
        if not np.isfinite(out[start : start + rows]).all():
            finite = bool(torch.isfinite(piece).all())
            why = "a value exceeds float16's 65504" if finite else "a value is not finite"
            raise InputRejected("a weight cannot be exported", where=", ".join(entry.sources), why=why)
