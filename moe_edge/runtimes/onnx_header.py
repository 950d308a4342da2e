"""Checks an ONNX folder before ONNX Runtime opens it: whatever its files point to must lie inside the folder.

An ONNX graph names the files that hold its weights; a crafted one can name any file of the machine. Every external
tensor's location must be a plain file directly in the folder, and its range must lie inside that file.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from moe_edge.contracts.errors import InputRejected
from moe_edge.storage.files import read_json, refuse_lfs_pointer

GRAPH, CONFIG = "model.onnx", "genai_config.json"
MAX_GRAPH_BYTES = 2**31 - 1
MAX_DIMENSION = 1 << 24


@dataclass(frozen=True)
class OnnxHeader:
    """What a runtime needs to know of the folder: sizes from genai_config.json, checked to be sane."""

    graph: Path
    vocab: int
    layers: int
    kv_heads: int
    head_dim: int
    context_length: int


def inspect_onnx(folder: Path, providers: Collection[str] = ()) -> OnnxHeader:
    """Read genai_config.json and check the graph's external data.

    Args:
        providers: accelerators whose folders are taken, too; by default only the CPU's, whose layout our runtime reads.

    Raises:
        InputRejected: a file is missing, corrupt, outside the folder or a symbolic link, a size is impossible, or the
            folder was written for another provider.
    """
    config = read_json(folder / CONFIG)
    graph = folder / GRAPH
    if not graph.is_file():
        raise InputRejected("an ONNX folder has no graph", where=str(folder), why=f"{GRAPH} is missing")
    model = _parse(graph)
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(folder, tensor)
    _refuse_other_provider(config, folder, providers)
    sizes = {
        name: _size(config, path, folder)
        for name, path in {
            "vocab": "model.vocab_size",
            "layers": "model.decoder.num_hidden_layers",
            "kv_heads": "model.decoder.num_key_value_heads",
            "head_dim": "model.decoder.head_size",
            "context_length": "model.context_length",
        }.items()
    }
    return OnnxHeader(graph, **sizes)


def _parse(graph: Path) -> onnx.ModelProto:
    refuse_lfs_pointer(graph)
    size = graph.stat().st_size
    if not 0 < size <= MAX_GRAPH_BYTES:
        raise InputRejected("an ONNX graph has an impossible size", where=str(graph), why=f"{size} bytes")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(graph.read_bytes())
    except DecodeError as error:
        raise InputRejected("an ONNX graph cannot be parsed", where=str(graph), why=str(error)) from error
    if not model.graph.node or not model.graph.output:
        raise InputRejected("an ONNX graph is empty", where=str(graph))
    return model


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that could carry a file reference: of the graph, its subgraphs, node attributes and functions."""
    pending: list[Any] = [model.graph, *model.functions]
    while pending:
        scope = pending.pop()
        yield from getattr(scope, "initializer", ())
        for sparse in getattr(scope, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in scope.node:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)
                pending += [attribute.g, *attribute.graphs]


def _check_external(folder: Path, tensor: onnx.TensorProto) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    where = f"{folder / GRAPH}, tensor {tensor.name!r}"
    if len(entries) != len(tensor.external_data):
        why = "a key occurs twice, and a reader may take either"
        raise InputRejected("an ONNX tensor's reference is ambiguous", where=where, why=why)
    if location in ("", ".", "..") or Path(location).name != location or set(location) & set("\\:\0"):
        why = f"its data lie at {location!r}; expected a file name inside the folder"
        raise InputRejected("an ONNX tensor points outside its folder", where=where, why=why)
    path = folder / location
    if path.is_symlink() or not path.is_file():
        why = f"{location!r} is {'a symbolic link' if path.is_symlink() else 'missing'}"
        raise InputRejected("an ONNX tensor's data file cannot be used", where=where, why=why)
    try:
        end = int(entries.get("offset") or 0) + int(entries.get("length") or 0)
        negative = any(int(entries.get(key) or 0) < 0 for key in ("offset", "length"))
    except ValueError as error:
        raise InputRejected("an ONNX tensor has a malformed range", where=where, why=str(error)) from error
    size = path.stat().st_size
    if negative or end > size:
        why = f"it ends at byte {end}, the file has {size}"
        raise InputRejected("an ONNX data file is truncated", where=where, why=why)


def _refuse_other_provider(config: dict[str, Any], folder: Path, known: Collection[str]) -> None:
    """Raises InputRejected when the folder was written for an accelerator that is not among the known."""
    options: Any = config
    for key in ("model", "decoder", "session_options", "provider_options"):
        options = options.get(key) if isinstance(options, dict) else None
    names = [name for option in options or () if isinstance(option, dict) for name in option if name not in known]
    if names:
        why = f"genai_config.json asks for the provider {', '.join(names)}"
        raise InputRejected(
            f"this ONNX folder is not for {' or '.join(('the CPU', *known))}", where=str(folder), why=why
        )


def _size(config: dict[str, Any], path: str, folder: Path) -> int:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_DIMENSION:
        why = f"{path} is {value!r}, expected an integer between 1 and {MAX_DIMENSION}"
        raise InputRejected("genai_config.json has an impossible value", where=str(folder / CONFIG), why=why)
    return value
