"""The first layers of a checkpoint as a checkpoint of its own: for what must be run whole but does not fit into memory.

Embedding, norm and head stay, so that the result is a language model of the same family with the same numbers in it. It is
no good one; it serves to compare two ways to compute it. Tensors are copied piece by piece, the model is never loaded.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.families import student_family
from moe_edge.models.loading import complete_student
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.files import write_json_atomic
from moe_edge.storage.folders import written_beside
from moe_edge.storage.tensor_files import PieceReader, PlannedTensor, write_tensors


def layers_within(headers: CheckpointHeaders, weights: float) -> int:
    """How many of the first layers have, with embedding, norm and head, at most so many weights; 0: not even one."""
    layers = student_family(headers.config).spec(headers.config).layers
    sizes = [0] * (layers + 1)  # the last one: what is in no layer
    for name, layer in _layer_of_tensor(headers).items():
        sizes[layers if layer is None else layer] += prod(headers.tensors[name].shape)
    fitting, total = 0, sizes.pop()
    for size in sizes:
        total += size
        if total > weights:
            break
        fitting += 1
    return fitting


def write_first_layers(source: Path, layers: int, out: Path) -> None:
    """Write the checkpoint `source`, cut behind its first `layers` decoder layers, as the folder `out`.

    Raises:
        InputRejected: the checkpoint cannot be used.
    """
    headers = inspect_checkpoint(source)
    names = [name for name, layer in _layer_of_tensor(headers).items() if layer is None or layer < layers]
    with written_beside(out) as folder, PieceReader(headers) as reader:
        plan = [PlannedTensor(name, reader.info(name).dtype, tuple(reader.info(name).shape)) for name in names]
        write_tensors(folder, plan, lambda tensor: (piece for _, piece in reader.pieces(tensor.name)))
        write_json_atomic(folder / "config.json", cut_config(headers.config, layers))
        complete_student(source, folder)


def cut_config(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """config.json for the first layers; a list with one value per layer is cut like the layers."""
    before, last = config["num_hidden_layers"], "moe_layer_end_index"
    cut = {
        key: value[:layers] if isinstance(value, list) and len(value) == before and "token" not in key else value
        for key, value in config.items()
    }
    ends = {last: min(config[last], layers - 1)} if isinstance(config.get(last), int) else {}
    return cut | ends | {"num_hidden_layers": layers}


def _layer_of_tensor(headers: CheckpointHeaders) -> dict[str, int | None]:
    """The tensors that make up the model, in the order of the files, and the layer of each."""
    entries = student_family(headers.config).tensors(headers.config, headers.tensors)
    layers = {name: entry.layer for entry in entries for name in entry.sources}
    return {name: layers[name] for name in headers.tensors if name in layers}
