"""The last look at a GGUF file before it counts: every tensor that the checkpoint implies, in its type and its bytes.

What: `audit`. Expected are the tensors of the checkpoint's neutral map under the recipe, worked out from headers alone and
without the writer's or the quantizer's help, so that a layer that was skipped or an expert tensor that stayed float16
fails the export with its name. It also returns what a report says of a file: bytes and bits per weight of every tensor
class, and how many tensors got a larger type than the recipe names because their rows are no multiple of its block.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn, Self

from moe_edge.contracts.errors import MoeEdgeError
from moe_edge.contracts.quantization import Mix, chosen_type, tensor_bytes, type_for_row
from moe_edge.contracts.spec import TensorClass
from moe_edge.exporting.gguf_layout import file_entries, stored_tensors
from moe_edge.families import student_family
from moe_edge.runtimes.gguf_header import GgufTensor, check_gguf_header
from moe_edge.storage.checkpoint import inspect_checkpoint

SHOWN = 3  # problems in an error


@dataclass(frozen=True)
class Expected:
    """One tensor that the file must hold."""

    tensor_class: TensorClass
    shape: tuple[int, ...]
    named: str  # the recipe's type
    kind: str  # the type that its rows allow


@dataclass(frozen=True)
class StoredSizes:
    """What a report tells of the tensor classes of a file."""

    bytes_by_class: dict[str, int]
    bits_per_weight_by_class: dict[str, float]
    fallbacks: dict[str, int] | None = None  # "Q4_K -> Q5_0": tensors; None where a format has none

    @classmethod
    def of(cls, size: Mapping[str, int], weights: Mapping[str, int], fallbacks: dict[str, int] | None = None) -> Self:
        """From the bytes and the number of weights of every class."""
        classes = sorted(size)
        bits = {name: round(8 * size[name] / weights[name], 3) for name in classes}
        return cls({name: size[name] for name in classes}, bits, fallbacks)


def expected_tensors(checkpoint: Path, recipe: str, mix: Mix | None = None) -> dict[str, Expected]:
    """What a file of `checkpoint` under a recipe and a plan's mix consists of, by GGUF name.

    Raises:
        ConfigError: the recipe is unknown.
    """
    headers = inspect_checkpoint(checkpoint)
    family = student_family(headers.config)
    spec, found = family.spec(headers.config), {}
    for entry in file_entries(family.tensors(headers.config, headers.tensors), spec):
        named = chosen_type(recipe, entry.tensor_class, entry.layer, mix)
        for stored in stored_tensors(entry, spec):
            kind = type_for_row(named, stored.shape[-1])
            found[stored.name] = Expected(entry.tensor_class, stored.shape, named, kind)
    return found


def audit(parts: Sequence[Path], checkpoint: Path, recipe: str, mix: Mix | None = None) -> StoredSizes:
    """Compare a file, whole or in parts, with what it must be; returns what it is.

    Raises:
        MoeEdgeError: a tensor is missing, unknown, or stored in another type, shape or number of bytes.
    """
    wanted = expected_tensors(checkpoint, recipe, mix)
    actual = {name: tensor for part in parts for name, tensor in check_gguf_header(part).tensors.items()}
    problems = [f"'{name}' is missing" for name in wanted if name not in actual]
    problems += [f"'{name}' does not belong to this model" for name in actual if name not in wanted]
    problems += [text for name in wanted if name in actual and (text := _difference(wanted[name], actual[name]))]
    if problems:
        refuse(problems, parts[0])
    fallbacks = Counter(f"{item.named} -> {item.kind}" for item in wanted.values() if item.named != item.kind)
    size, weights = Counter[str](), Counter[str]()
    for name, item in wanted.items():
        size[item.tensor_class] += actual[name].bytes
        weights[item.tensor_class] += prod(item.shape)
    return StoredSizes.of(size, weights, dict(sorted(fallbacks.items())))


def refuse(problems: Sequence[str], where: Path) -> NoReturn:
    """Raises MoeEdgeError with the first problems of a written file."""
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    raise MoeEdgeError(
        "the exported file is not what was asked for",
        where=str(where),
        why="; ".join(problems[:SHOWN]) + more,
        next_command="delete the export folder and export again; if it stays, report a bug with this message",
    )


def _difference(wanted: Expected, actual: GgufTensor) -> str | None:
    expected_bytes = tensor_bytes(wanted.kind, wanted.shape)
    if actual.kind != wanted.kind:
        bits, planned = (8 * size / prod(wanted.shape) for size in (actual.bytes, expected_bytes))
        return (
            f"'{actual.name}' ({wanted.tensor_class}) is {actual.kind}, {bits:.2f} bits per weight, the recipe says "
            f"{wanted.kind}, {planned:.2f}"
        )
    if _without_ones(actual.shape) != _without_ones(wanted.shape) or actual.bytes != expected_bytes:
        return f"'{actual.name}' has shape {actual.shape} in {actual.bytes} bytes, expected {wanted.shape}"
    return None


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """libllama does not write the first axis of a single expert."""
    return tuple(size for size in shape if size != 1)
