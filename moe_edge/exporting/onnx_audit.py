"""The last look at an ONNX folder before it counts: every weight that the checkpoint implies, in its bits and its bytes.

What: `audit_onnx`. Expected is what the checkpoint's neutral map costs under the precision, per class and layer, worked out
from its headers; found is what the nodes of the written file read. The tables of the quantization pass (onnx_pack)
are not consulted: a rule that is missing there leaves weights in float silently, and a shared table would hide it. A class
that is missing, a layer that was skipped, experts of one layer that stayed float fail the export with their name.

Allowed in float: what `weight_class` has no class for (norms, biases, sinks, convolution kernels), counted per layer too;
the rotary tables and the graph's constants, which no checkpoint holds.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

import onnx

from moe_edge.contracts.onnx_bits import LayerBits, Provider, bits_of, stored_bytes, weight_class
from moe_edge.contracts.spec import TensorEntry
from moe_edge.exporting.gguf_audit import StoredSizes, refuse
from moe_edge.families import student_family
from moe_edge.runtimes.onnx_header import GRAPH, inspect_onnx
from moe_edge.storage.checkpoint import TensorReader

QKV_BIASES = ("q_bias", "k_bias", "v_bias")
PLAIN = "float"  # the class of weights that are never quantized
# Where a node lies in the graph -> the class of its weights.
_PLACES = (
    ("/moe/MoE", "expert"), ("/moe/router/", "router"), ("/shared_expert_gate/", "router"), ("/attn/", "attention"),
    ("/conv/", "attention"), ("/mlp/", "shared"), ("/lm_head/", "head"), ("/embed_tokens/", "embedding"),
)  # fmt: skip
# Operator -> groups of inputs that make up one matrix (codes first), and the attribute that holds its bits.
_READS: dict[str, tuple[tuple[tuple[int, ...], ...], str | None]] = {
    "MatMul": (((1,),), None), "Gemm": (((1,),), None), "Gather": (((0,),), None), "MoE": (((2,), (4,)), None),
    "MatMulNBits": (((1, 2, 3),), "bits"), "GatherBlockQuantized": (((0, 2, 3),), "bits"),
    "QMoE": (((2, 3, 11), (5, 6, 12)), "expert_weight_bits"),
}  # fmt: skip
_PASS_THROUGH = ("Cast", "Transpose", "Reshape")  # a node behind one of these reads the initializer before it
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_OF_THE_GRAPH = re.compile(r"(cos|sin)_cache|/model/constants/")

Place = tuple[str, int | None]  # class, decoder layer


@dataclass
class StoredClass:
    """Numbers of one class in one layer, and what they take."""

    weights: int = 0
    bytes: int = 0
    bits: set[int] = field(default_factory=set)

    def add(self, weights: int, size: int, bits: int) -> None:
        """Count one matrix."""
        self.weights += weights
        self.bytes += size
        self.bits.add(bits)


class Matrix(NamedTuple):
    """What one node reads as a weight."""

    node: str
    stored: list[onnx.TensorProto]  # the codes, or the numbers themselves, first
    bits: int


def expected_costs(
    checkpoint: Path, precision: str, block_size: int, layer_bits: LayerBits | None = None, provider: Provider = "cpu"
) -> dict[Place, StoredClass]:
    """What every class costs in every layer of an export of `checkpoint`; a tied embedding is the head's tensor.

    Raises:
        ConfigError: the precision is unknown, or no block divides a row.
    """
    reader = TensorReader(checkpoint)
    config = reader.headers.config
    family = student_family(config)
    spec, found = family.spec(config), defaultdict[Place, StoredClass](StoredClass)
    widest = 16 if provider == "cuda" else 32
    for entry in _written(family.tensors(config, reader.headers.tensors), reader):
        kind = weight_class(entry.tensor_class)
        kind = "head" if kind == "embedding" and spec.tied_embeddings else kind
        dense = not spec.moe_layers
        bits = 32 if kind is None else bits_of(precision, kind, entry.layer, layer_bits, dense)
        bits = min(bits, widest)
        shape = spec.real_shape(entry)  # padding experts are not written
        size = stored_bytes(entry.tensor_class, shape, bits, block_size)
        found[kind or PLAIN, entry.layer].add(prod(shape), size, bits)
    return dict(found)


def _written(entries: Sequence[TensorEntry], reader: TensorReader) -> list[TensorEntry]:
    """Without the biases of q, k and v in layers where all of them are zero: the builder leaves those out."""
    adds = {entry.layer for entry in entries if entry.part in QKV_BIASES and reader.get(entry.sources[0]).any()}
    return [entry for entry in entries if entry.part not in QKV_BIASES or entry.layer in adds]


def audit_onnx(
    folder: Path,
    checkpoint: Path,
    precision: str,
    block_size: int,
    layer_bits: LayerBits | None = None,
    provider: Provider = "cpu",
) -> StoredSizes:
    """Compare a written folder with what it must be.

    Args:
        precision, block_size, layer_bits, provider: what `export_onnx` was asked for.

    Returns:
        Bytes and bits per weight of every class that has bits to choose, and of the routers.

    Raises:
        MoeEdgeError: a class is missing in a layer, has other bits, weights or bytes, or a node's weights have no class.
        InputRejected: the folder's graph or config is not sane.
    """
    wanted = expected_costs(checkpoint, precision, block_size, layer_bits, provider)
    inspect_onnx(folder, (provider,))
    layers = max(layer for _, layer in wanted if layer is not None) + 1
    found, problems = _found(onnx.load(folder / GRAPH, load_external_data=False), layers)
    problems += [f"{_name(place)} is missing" for place in wanted if place not in found]
    problems += [f"{_name(place)} does not belong to this model" for place in found if place not in wanted]
    for place in wanted.keys() & found.keys():
        problems += _differences(_name(place), wanted[place], found[place])
    if problems:
        refuse(sorted(problems), folder / GRAPH)
    size, weights = Counter[str](), Counter[str]()
    for (kind, _), cost in found.items():
        if kind != PLAIN:
            size[kind] += cost.bytes
            weights[kind] += cost.weights
    return StoredSizes.of(size, weights)


def _name(place: Place) -> str:
    kind, layer = place
    return kind if layer is None else f"{kind} of layer {layer}"


def _differences(name: str, wanted: StoredClass, found: StoredClass) -> list[str]:
    """Bits first: where they differ, bytes do, too."""
    if found.weights != wanted.weights:
        return [f"{name} has {found.weights} weights, the model has {wanted.weights}"]
    if found.bits != wanted.bits:
        has, asked = (" and ".join(map(str, sorted(cost.bits))) for cost in (found, wanted))
        return [f"{name} is stored in {has} bits, asked for were {asked}"]
    if found.bytes != wanted.bytes:
        has, asked = (f"{8 * cost.bytes / cost.weights:.3f}" for cost in (found, wanted))
        return [f"{name} takes {has} bits per weight, expected {asked}"]
    return []


def _found(model: onnx.ModelProto, layers: int) -> tuple[dict[Place, StoredClass], list[str]]:
    """What the file holds by class and layer, and what belongs to none."""
    found, problems, seen = defaultdict[Place, StoredClass](StoredClass), [], set[str]()
    for matrix in sorted(_matrices(model), key=lambda matrix: "/embed_tokens/" in matrix.node):  # it may be the head's
        if not matrix.stored[0].name or matrix.stored[0].name in seen:
            continue
        seen |= {tensor.name for tensor in matrix.stored}
        kind = next((kind for path, kind in _PLACES if path in matrix.node), None)
        if kind is None:
            problems.append(f"'{matrix.node}' carries weights of no class")
            continue
        numbers, size = prod(matrix.stored[0].dims), sum(map(_bytes, matrix.stored))
        packed = matrix.stored[0].data_type not in _FLOATS
        found[kind, _layer(matrix.node)].add(numbers * 8 // matrix.bits if packed else numbers, size, matrix.bits)
    for tensor in model.graph.initializer:
        if _bytes(tensor) != _declared(tensor):
            problems.append(f"'{tensor.name}' has {_declared(tensor)} bytes, its shape says {_bytes(tensor)}")
        if tensor.data_type in _FLOATS and tensor.name not in seen and not _OF_THE_GRAPH.match(tensor.name):
            layer = _layer(tensor.name)
            place = (PLAIN, None if layer == layers else layer)  # the final norm is named like a layer more
            found[place].add(prod(tensor.dims), _bytes(tensor), 8 * _itemsize(tensor))
    return dict(found), problems


def _matrices(model: onnx.ModelProto) -> Iterator[Matrix]:
    """Every node's weights; inputs that are computed are none."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}

    def source(name: str) -> onnx.TensorProto | None:
        while name not in tensors and name in producers and producers[name].op_type in _PASS_THROUGH:
            name = producers[name].input[0]
        return tensors.get(name)

    for node in model.graph.node:
        groups, attribute = _READS.get(node.op_type, ((), None))
        for group in groups:
            inputs = [node.input[at] for at in group if at < len(node.input)]
            stored = [tensor for tensor in map(source, inputs) if tensor is not None]
            if stored and (attribute or stored[0].data_type in _FLOATS):
                bits = next((a.i for a in node.attribute if a.name == attribute), 0) or 8 * _itemsize(stored[0])
                yield Matrix(node.name, stored, bits)


def _layer(name: str) -> int | None:
    match = re.search(r"\blayers\.(\d+)[./]", name)
    return int(match[1]) if match else None


def _itemsize(tensor: onnx.TensorProto) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _bytes(tensor: onnx.TensorProto) -> int:
    """What the shape and the type take."""
    return int(prod(tensor.dims)) * _itemsize(tensor)


def _declared(tensor: onnx.TensorProto) -> int:
    """What lies in the file for it."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return int(next((entry.value for entry in tensor.external_data if entry.key == "length"), 0))
    return len(tensor.raw_data) or onnx.numpy_helper.to_array(tensor).nbytes
