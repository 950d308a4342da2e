"""A part of a checkpoint as a checkpoint of its own, tensor by tensor on disk, without ever loading the model.

`stream_pruned_checkpoint` leaves experts out. The new checkpoint has the tensors that `pruning.prune` and
`loading.save_student` give for the same choice, in the names and layout of the old one; every number that is kept keeps
its bytes. Memory holds one expert's matrix at a time.

`write_first_layers` keeps the first decoder layers, for what must be run whole but does not fit into memory. Embedding,
norm and head stay, so that the result is a language model of the same family with the same numbers in it. It is no good
one; it serves to compare two ways to compute it.

Legend: E experts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_edge.contracts.capability_table import PADDING
from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.plan import KeptExperts
from moe_edge.contracts.spec import EXPERT_SIZED, TensorEntry, places
from moe_edge.families import family_of, student_family
from moe_edge.models.loading import complete_student, stored_dtype
from moe_edge.models.padding import PADDING_BIAS
from moe_edge.models.pruning import prune
from moe_edge.models.streaming import meta_model
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.files import write_json_atomic
from moe_edge.storage.folders import written_beside
from moe_edge.storage.tensor_files import SHARD_BYTES, PieceReader, PlannedTensor, write_tensors

Placed = dict[int, tuple[int | None, ...]]


@dataclass(frozen=True)
class Copy:
    """Where a tensor of the new checkpoint comes from."""

    source: str
    ids: tuple[int | None, ...] | None = None  # the experts that stay (None: padding); None: all of the source
    axis: int = 0  # of the experts
    fill: float = 0.0  # of padding
    empty: bool = False  # a padding expert's own tensor: zeros in the source's shape


def stream_pruned_checkpoint(
    source: Path,
    kept: KeptExperts,
    top_k: int | None,
    out: Path,
    *,
    uneven: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the checkpoint folder `source` without the dropped experts into the folder `out`: a plain checkpoint.

    Args:
        kept: decoder layer -> kept expert ids, ascending; a layer that is absent keeps all.
        top_k: the student's, where it differs from the teacher's.
        uneven: may layers keep different numbers? See `pruning.prune`.

    Raises:
        ConfigError: see `pruning.check_kept`; nothing has been written then.
        InputRejected: the checkpoint cannot be used.
    """
    headers = inspect_checkpoint(source, require_tokenizer=False)
    model = meta_model(headers, stored_dtype(headers))
    prune(model, kept, top_k, uneven=uneven)  # without weights: it checks the choice and writes the configuration
    copies = _copies(headers, placed(kept, family_of(headers.config).spec(headers.config).moe.groups))
    out.mkdir(parents=True, exist_ok=True)
    with PieceReader(headers) as reader:
        plan = [_planned(name, copy, reader) for name, copy in copies.items()]
        write_tensors(out, plan, lambda tensor: _pieces(copies[tensor.name], reader), shard_bytes)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    complete_student(source, out)


def placed(kept: KeptExperts, groups: int) -> Placed:
    """Decoder layer -> the teacher's expert at every place of the student's layer; None where padding stands."""
    total = max(map(len, kept.values()), default=0)
    found: Placed = {}
    for layer, ids in kept.items():
        at = dict(zip(places(len(ids), total, groups), ids, strict=True))
        found[layer] = tuple(at.get(place) for place in range(total))
    return found


def _copies(headers: CheckpointHeaders, kept: Placed) -> dict[str, Copy]:
    """New name -> what it is made of, in the order of the old files, so that reading is sequential."""
    found: dict[str, Copy] = {}
    for entry in family_of(headers.config).tensors(headers.config, headers.tensors):
        found |= _copies_of(entry, kept, headers)
    place = {name: number for number, name in enumerate(headers.tensors)}
    return dict(sorted(found.items(), key=lambda item: place[item[1].source]))


def padding_value(entry: TensorEntry, family: str) -> float:
    """What stands in a padding expert's part of a tensor."""
    return PADDING_BIAS if entry.tensor_class == PADDING.get(family) else 0.0


def _copies_of(entry: TensorEntry, kept: Placed, headers: CheckpointHeaders) -> dict[str, Copy]:
    ids = kept.get(entry.layer) if entry.layer is not None and entry.tensor_class in EXPERT_SIZED else None
    if ids is None:
        return {name: Copy(name) for name in entry.sources}
    if entry.layout == "per_expert":
        padding = Copy(entry.sources[0], empty=True)
        pairs = enumerate(ids)
        return {entry.sources[new]: padding if old is None else Copy(entry.sources[old]) for new, old in pairs}
    (name,) = entry.sources
    shape, fill = headers.tensors[name].shape, padding_value(entry, family_of(headers.config).model_type)
    return {name: Copy(name, ids, 0 if shape[0] == entry.shape[0] else len(shape) - 1, fill)}


def _planned(name: str, copy: Copy, reader: PieceReader) -> PlannedTensor:
    info = reader.info(copy.source)
    shape = list(info.shape)
    if copy.ids is not None:
        shape[copy.axis] = len(copy.ids)
    return PlannedTensor(name, info.dtype, tuple(shape))


def _pieces(copy: Copy, reader: PieceReader) -> Iterator[Tensor]:
    """The numbers of a new tensor in order."""
    if copy.ids is None:
        yield from (torch.zeros_like(piece) if copy.empty else piece for _, piece in reader.pieces(copy.source))
    elif copy.axis == 0:
        padding = torch.full_like(reader.rows(copy.source, 0, 1), copy.fill)
        yield from (padding if one is None else reader.rows(copy.source, one, one + 1) for one in copy.ids)
    else:
        old = reader.rows(copy.source)
        padding = torch.full_like(old[..., 0], copy.fill)
        yield torch.stack([padding if one is None else old[..., one] for one in copy.ids], dim=-1)


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
