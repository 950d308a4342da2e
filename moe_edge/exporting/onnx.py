"""Exports a Hugging Face MoE checkpoint as an onnxruntime-genai folder: graph, external weights, config and tokenizer.

fp32 is the parity graph (operator MoE), fp16 halves the file and computes in float32, int8 and int4 use QMoE for the
experts and MatMulNBits for the rest (see PRECISIONS). The same checkpoint and arguments give the same bytes; the folder
appears under its name only when it is complete.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.contracts.onnx_bits import LayerBits, Provider, bits_of, refuse_absent_layers
from moe_edge.exporting.imatrix import Importance
from moe_edge.exporting.onnx_check import check_cuda_folder
from moe_edge.exporting.onnx_graph import build_graph, write_companions
from moe_edge.exporting.onnx_pack import FAST_ACCURACY, PackedClasses, Packer, WeightRecipe
from moe_edge.exporting.onnx_quantize import Scheme
from moe_edge.families import student_family
from moe_edge.models.loading import stored_dtype
from moe_edge.models.pruning import without_padding
from moe_edge.models.students import load_student
from moe_edge.storage.checkpoint import copy_to_place, inspect_checkpoint, tokenizer_files
from moe_edge.storage.files import read_json, write_json_atomic
from moe_edge.storage.folders import written_beside

logger = logging.getLogger(__name__)
GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
INLINE_BYTES = 1024  # smaller tensors (shapes, constants) stay in the graph file
COPIED = ("config.json", "generation_config.json")


def export_onnx(
    checkpoint: Path,
    out: Path,
    *,
    precision: str,
    block_size: int = 32,
    imatrix: Mapping[str, Any] | None = None,
    kept: Mapping[int, list[int]] | None = None,
    scheme: Scheme = "search",
    accuracy_level: int = FAST_ACCURACY,
    layer_bits: LayerBits | None = None,
    provider: Provider = "cpu",
) -> dict[str, Any]:
    """Write the ONNX folder `out` of the checkpoint.

    Args:
        precision: a row of PRECISIONS: fp32, fp16, int8 or int4.
        block_size: weights that share one scale; halved for a matrix whose rows it does not divide.
        imatrix: the profile's sums of squares by neutral names; None quantizes unweighted.
        kept: layer -> the teacher's expert ids that the checkpoint kept, to pick their rows of the imatrix; None: its rows are
            the checkpoint's experts.
        scheme: "search" (ours) or "rtn" (the baseline).
        layer_bits: bits of classes and layers instead of the precision's (contracts/onnx_bits.py).
        provider: "cpu", or "cuda": float16 throughout, for a machine that has it; never opened here, only checked.
        accuracy_level: of MatMulNBits and QMoE; 4 computes with int8 activations, 0 in float32.

    Returns:
        JSON-able summary: precision, block_size, bits, bytes_by_class, bits_per_weight, nodes (operator counts), bytes.

    Raises:
        ConfigError: unknown precision, float32 for CUDA, bits of layers that are not there, or rows that no block divides.
        GateFailed: a graph for CUDA is malformed.
        InputRejected: unsupported family or a checkpoint without usable tokenizer.
        EnvironmentProblem: another onnxruntime-genai than the pinned one.
    """
    bits_of(precision, "expert")  # refuse an unknown one before the model is read
    if provider == "cuda" and precision == "fp32":
        raise ConfigError("a graph for CUDA computes in float16", next_command="--set export.onnx.precision=fp16")
    recipe = WeightRecipe(precision, block_size, scheme, accuracy_level, layer_bits or {}, provider)
    headers = inspect_checkpoint(checkpoint)
    spec = student_family(headers.config).spec(headers.config)
    refuse_absent_layers(recipe.layer_bits, spec.layers)
    model = load_student(checkpoint, dtype=stored_dtype(headers))  # widened tensor by tensor
    if spec.moe.experts_per_layer:  # the graph's layers hold their own experts only (contracts/capability_table.py)
        without_padding(model)
        kept = kept or {layer: spec.real_experts(layer) for layer in spec.moe_layers}
    with written_beside(out) as partial, tempfile.TemporaryDirectory(prefix="moe-edge-onnx-") as work, torch.no_grad():
        builder = build_graph(model, spec, checkpoint, Path(work), provider)
        report = Packer(builder.model, recipe, Importance(imatrix, kept, spec.moe_layers)).run()
        nodes = Counter(node.op_type for node in builder.model.graph)
        ir.save(builder.model, partial / GRAPH, external_data=WEIGHTS, size_threshold_bytes=INLINE_BYTES)
        _write_companions(builder, headers, partial)
        if provider == "cuda":
            check_cuda_folder(partial)
    return _summary(out, precision, block_size, report, nodes)


def _write_companions(builder: Any, headers: CheckpointHeaders, out: Path) -> None:
    """genai_config.json and the checkpoint's own files: saved anew, a tokenizer would be readable by transformers 5 alone."""
    checkpoint = headers.folder
    try:
        write_companions(builder, checkpoint, out)
    except (OSError, ValueError) as error:
        raise InputRejected("the tokenizer cannot be exported", where=str(checkpoint), why=str(error)) from error
    own = [checkpoint / name for name in COPIED if (checkpoint / name).is_file()]
    copy_to_place([*own, *tokenizer_files(checkpoint)], out)
    _keep_default_template(out / "tokenizer_config.json")
    if headers.config != read_json(checkpoint / "config.json"):  # the graph is not in MXFP4, and has the stored head
        write_json_atomic(out / "config.json", headers.config)


def _keep_default_template(path: Path) -> None:
    """A list of named chat templates becomes the default one: onnxruntime-genai reads a string, or fails.

    Raises:
        InputRejected: an entry of the list is not {"name", "template"}.
    """
    config = read_json(path) if path.is_file() else {}
    templates = config.get("chat_template")
    if isinstance(templates, list):
        try:
            named = {str(entry["name"]): str(entry["template"]) for entry in templates}
        except (TypeError, KeyError) as error:
            why = f"an entry of the list of chat templates has no {error}"
            raise InputRejected("the chat templates cannot be read", where=str(path), why=why) from error
        config.pop("chat_template")
        write_json_atomic(path, config | ({"chat_template": named["default"]} if "default" in named else {}))


def _summary(out: Path, precision: str, block_size: int, report: PackedClasses, nodes: Counter[str]) -> dict[str, Any]:
    classes = sorted(report.bits)
    return {
        "precision": precision,
        "block_size": block_size,
        "bits": {name: sorted(report.bits[name]) for name in classes},
        "bytes_by_class": {name: report.bytes[name] for name in classes},
        "bits_per_weight": {name: round(8 * report.bytes[name] / report.weights[name], 3) for name in classes},
        "nodes": dict(sorted(nodes.items())),
        "bytes": sum((out / name).stat().st_size for name in (GRAPH, WEIGHTS)),
    }
