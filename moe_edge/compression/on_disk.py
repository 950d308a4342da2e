"""Dropping experts of a teacher that does not fit in memory, and the proof that the copy is right without loading it.

The proof reads both checkpoints again: every tensor of the student, and every expert's part of one, must have the SHA-256
of what the plan says it comes from. It follows the neutral tensor map, not the writer's own table of copies.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.errors import MoeEdgeError, ResourceProblem
from moe_edge.contracts.plan import Plan
from moe_edge.contracts.spec import EXPERT_SIZED, TensorEntry
from moe_edge.contracts.units import format_bytes
from moe_edge.families import family_of
from moe_edge.models.checkpoint_subsets import padding_value, stream_pruned_checkpoint
from moe_edge.process.placement import can_be_edited, free_bytes
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.tensor_files import PieceReader


def held_whole(headers: CheckpointHeaders, mode: str) -> bool:
    """Will compression hold the whole teacher? Not where it does not fit, nor where it was asked to be streamed.

    Args:
        mode: profile.mode.
    """
    return mode != "layerwise" and can_be_edited(headers)


def only_drops(plan: Plan) -> bool:
    """Is the student nothing but the teacher without some experts?"""
    return plan.action == "drop" and not plan.fits and plan.expert_width is None


def require_only_drops(headers: CheckpointHeaders, plan: Plan) -> None:
    """Refuse what cannot be done tensor by tensor.

    Raises:
        ResourceProblem: the plan needs the whole model in memory.
    """
    if not only_drops(plan):
        free = format_bytes(free_bytes())
        raise ResourceProblem(
            "the teacher does not fit in memory",
            where=str(headers.folder),
            why=f"its weights take {format_bytes(headers.total_bytes)}, {free} are free; only plain dropping works on disk",
            next_command="--set plan.action=drop with plan.compensate=false and plan.expert_width=keep, or more memory",
        )


def drop_on_disk(headers: CheckpointHeaders, plan: Plan, folder: Path) -> int:
    """Write the student of `plan` into `folder` tensor by tensor and check it; returns how many parts were compared.

    Raises:
        ResourceProblem: see `require_only_drops`.
        ConfigError: see `pruning.check_kept`.
        MoeEdgeError: a part differs, so that writing or the disk is broken.
    """
    require_only_drops(headers, plan)
    kept = plan.kept if plan.prunes else {}
    stream_pruned_checkpoint(headers.folder, kept, plan.top_k, folder, uneven=plan.uneven)
    return compare_parts(headers, inspect_checkpoint(folder), kept)


def compare_parts(teacher: CheckpointHeaders, student: CheckpointHeaders, kept: dict[int, list[int]]) -> int:
    """Compare every tensor of the student with the part of the teacher that it must be; returns the number of parts.

    Raises:
        MoeEdgeError: a digest or the number of parts differs.
    """
    maps = [family_of(one.config).tensors(one.config, one.tensors) for one in (teacher, student)]
    spec, count = family_of(student.config).spec(student.config), 0
    with PieceReader(teacher) as old_reader, PieceReader(student) as new_reader:
        for old, new in zip(*maps, strict=True):
            ids = kept.get(old.layer) if old.layer is not None and old.tensor_class in EXPERT_SIZED else None
            real = None if ids is None or new.layer is None else spec.real_experts(new.layer)
            expected, found = list(_digests(old, ids, old_reader)), list(_digests(new, real, new_reader))
            if expected != found or not _rest_is_padding(new, real, new_reader, padding_value(new, spec.family)):
                why = "the SHA-256 of its numbers is not that of the teacher's"
                raise MoeEdgeError("the streamed student differs from the teacher", where=new.sources[0], why=why)
            count += len(found)
    return count


def _digests(entry: TensorEntry, ids: Sequence[int] | None, reader: PieceReader) -> Iterator[str]:
    """One digest per tensor; of an expert tensor one per expert, of those in `ids` (None: all)."""
    if entry.tensor_class not in EXPERT_SIZED:
        yield from (_digest(name, reader) for name in entry.sources)
    elif entry.layout == "per_expert":
        chosen = range(len(entry.sources)) if ids is None else ids
        yield from (_digest(entry.sources[expert], reader) for expert in chosen)
    else:
        (name,) = entry.sources
        experts, shape = entry.shape[0], reader.info(name).shape
        for expert in range(experts) if ids is None else ids:
            if shape[0] == experts:
                values = reader.rows(name, expert, expert + 1)
            else:
                values = reader.rows(name)[..., expert]
            yield hashlib.sha256(_bytes(values)).hexdigest()


def _rest_is_padding(entry: TensorEntry, real: Sequence[int] | None, reader: PieceReader, fill: float) -> bool:
    """Holds every expert of an entry beyond the real ones nothing but `fill`?"""
    rest = [] if real is None else sorted(set(range(entry.shape[0])) - set(real))
    if entry.layout == "per_expert":
        values = (reader.rows(entry.sources[expert]) for expert in rest)
    else:
        (name,) = entry.sources
        first = reader.info(name).shape[0] == entry.shape[0]
        values = (reader.rows(name, one, one + 1) if first else reader.rows(name)[..., one] for one in rest)
    return all(bool((part == torch.tensor(fill, dtype=part.dtype)).all()) for part in values)


def _digest(name: str, reader: PieceReader) -> str:
    digest = hashlib.sha256()
    for _, values in reader.pieces(name):
        digest.update(_bytes(values))
    return digest.hexdigest()


def _bytes(values: torch.Tensor) -> bytes:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
