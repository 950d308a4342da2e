"""Dropping experts of a checkpoint on disk: tensor by tensor into a new one, without ever loading the model.

The new checkpoint has the tensors that `pruning.prune` and `loading.save_student` give for the same choice, in the names
and layout of the old one; every number that is kept keeps its bytes. Memory holds one expert's matrix at a time.

Legend: E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_edge.contracts.capability_table import PADDING
from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.plan import KeptExperts
from moe_edge.contracts.spec import EXPERT_SIZED, TensorEntry, places
from moe_edge.families import family_of
from moe_edge.models.loading import complete_student, stored_dtype
from moe_edge.models.padding import PADDING_BIAS
from moe_edge.models.pruning import prune
from moe_edge.models.streaming import meta_model
from moe_edge.storage.checkpoint import inspect_checkpoint
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
