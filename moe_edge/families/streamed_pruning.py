"""Dropping experts of a checkpoint on disk: tensor by tensor into a new one, without ever loading the model.

The new checkpoint has the tensors that `pruning.prune` and `loading.save_student` give for the same choice, in the names
and layout of the old one; every number that is kept keeps its bytes. Memory holds one expert's matrix at a time.

Legend: E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moe_edge.contracts.spec import EXPERT_SIZED, TensorEntry
from moe_edge.families import family_of
from moe_edge.families.loading import complete_student, stored_dtype
from moe_edge.families.pruning import Kept, prune
from moe_edge.families.streaming import meta_model
from moe_edge.storage.checkpoint import CheckpointHeaders, inspect_checkpoint
from moe_edge.storage.tensor_files import SHARD_BYTES, PieceReader, PlannedTensor, write_tensors


@dataclass(frozen=True)
class Copy:
    """Where a tensor of the new checkpoint comes from."""

    source: str
    ids: tuple[int, ...] | None = None  # the experts that stay; None: all of the source
    axis: int = 0  # of the experts


def stream_pruned_checkpoint(
    source: Path, kept: Kept, top_k: int | None, out: Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the checkpoint folder `source` without the dropped experts into the folder `out`: a plain checkpoint.

    Args:
        kept: decoder layer -> kept expert ids, ascending; a layer that is absent keeps all.
        top_k: the student's, where it differs from the teacher's.

    Raises:
        ConfigError: see `pruning.check_kept`; nothing has been written then.
        InputRejected: the checkpoint cannot be used.
    """
    headers = inspect_checkpoint(source, require_tokenizer=False)
    model = meta_model(headers, stored_dtype(headers))
    prune(model, kept, top_k)  # without weights: it checks the choice and writes the configuration
    copies = _copies(headers, kept)
    out.mkdir(parents=True, exist_ok=True)
    with PieceReader(headers) as reader:
        plan = [_planned(name, copy, reader) for name, copy in copies.items()]
        write_tensors(out, plan, lambda tensor: _pieces(copies[tensor.name], reader), shard_bytes)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    complete_student(source, out)


def _copies(headers: CheckpointHeaders, kept: Kept) -> dict[str, Copy]:
    """New name -> what it is made of, in the order of the old files, so that reading is sequential."""
    found: dict[str, Copy] = {}
    for entry in family_of(headers.config).tensors(headers.config, headers.tensors):
        found |= _copies_of(entry, kept, headers)
    place = {name: number for number, name in enumerate(headers.tensors)}
    return dict(sorted(found.items(), key=lambda item: place[item[1].source]))


def _copies_of(entry: TensorEntry, kept: Kept, headers: CheckpointHeaders) -> dict[str, Copy]:
    ids = kept.get(entry.layer) if entry.layer is not None and entry.tensor_class in EXPERT_SIZED else None
    if ids is None:
        return {name: Copy(name) for name in entry.sources}
    if entry.layout == "per_expert":
        return {entry.sources[new]: Copy(entry.sources[old]) for new, old in enumerate(ids)}
    (name,) = entry.sources
    shape = headers.tensors[name].shape
    return {name: Copy(name, tuple(ids), 0 if shape[0] == entry.shape[0] else len(shape) - 1)}


def _planned(name: str, copy: Copy, reader: PieceReader) -> PlannedTensor:
    info = reader.info(copy.source)
    shape = list(info.shape)
    if copy.ids is not None:
        shape[copy.axis] = len(copy.ids)
    return PlannedTensor(name, info.dtype, tuple(shape))


def _pieces(copy: Copy, reader: PieceReader) -> Iterator[Tensor]:
    """The numbers of a new tensor in order."""
    if copy.ids is None:
        yield from (piece for _, piece in reader.pieces(copy.source))
    elif copy.axis == 0:
        yield from (reader.rows(copy.source, expert, expert + 1) for expert in copy.ids)
    else:
        yield reader.rows(copy.source)[..., list(copy.ids)]
