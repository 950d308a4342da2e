"""From the tensors of a checkpoint to those of a model: a parameter of transformers, or a neutral tensor of a back end.

For a parameter (`targets_of`, `read_weights`) names and layouts follow transformers' own table of checkpoint conversions, the
one that `from_pretrained` uses, so that a family needs no second description. Experts that a checkpoint stores one by one
are read straight into their place in the stacked tensor: no second copy of the stack exists at any time.

A neutral tensor (`assemble`) is an entry of `Family.tensors`: (E, F, D) whether the checkpoint names experts one by one or
holds them fused.

Shape suffixes: E experts, R rows of one expert, F expert width, D model.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.spec import TensorEntry
from moe_edge.families.names import halved_axis
from moe_edge.storage.tensor_files import PieceReader


@dataclass
class WeightTarget:
    """A parameter (or stored buffer) of the model and the checkpoint tensors that it is made of."""

    name: str  # in the model; the first one where a conversion makes several parameters
    converter: WeightConverter | None = None  # None: one tensor, as it is
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # converter's pattern -> names

    @property
    def stacks(self) -> bool:
        """Is it a stack of experts, each of one or more tensors one below the other?"""
        if self.converter is None:
            return False
        steps = [(type(step), getattr(step, "dim", None)) for step in self.converter.operations]
        return steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def targets_of(model: PreTrainedModel, names: Collection[str], shapes: dict[str, Tensor]) -> list[WeightTarget]:
    """The parameters of `model` that a checkpoint with tensors of these names fills.

    Args:
        shapes: the model's state dictionary, on whatever device.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, WeightTarget] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, shapes)
        if target not in shapes and name in shapes:  # already a name of the model: no conversion was meant
            target, pattern = name, None
        if target in shapes:
            converter = by_pattern[pattern] if pattern is not None else None
            found.setdefault(target, WeightTarget(target, converter)).sources[pattern or name].append(name)
    return list(found.values())


def read_weights(
    target: WeightTarget, empty: Tensor, device: torch.device, reader: PieceReader, model: PreTrainedModel
) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, values) of a target.

    Args:
        empty: any tensor of the wanted shape and dtype.
        model: whose configuration some conversions ask.

    Raises:
        InputRejected: the tensors do not fill the parameter.
    """
    if target.converter is not None and not target.stacks:
        for name, values in _converted(target, empty.dtype, reader, model):
            yield name, values.to(device)
        return
    values = torch.empty_like(empty, device=device)
    filled = _fill_stack(values, target, reader) if target.stacks else _fill_plain(values, target, reader)
    if filled != values.numel():
        why = f"{filled} numbers for a parameter of shape {list(values.shape)}"
        raise InputRejected("a tensor contradicts config.json", where=target.name, why=why)
    yield target.name, values


def _fill_plain(values: Tensor, target: WeightTarget, reader: PieceReader) -> int:
    """Copy one tensor in pieces of rows; returns how many numbers."""
    ((name,),) = target.sources.values()
    if reader.info(name).shape != tuple(values.shape):
        return 0
    for start, piece in reader.pieces(name):
        if values.ndim:
            values[start : start + len(piece)] = piece
        else:
            values.copy_(piece)
    return values.numel()


def _fill_stack(values_ERX: Tensor, target: WeightTarget, reader: PieceReader) -> int:
    """Copy the tensors of each expert one below the other; returns how many numbers."""
    assert target.converter is not None
    filled = offset = 0
    piece_RX = torch.empty(0)
    for pattern in target.converter.source_patterns:
        for expert, name in enumerate(target.sources[pattern]):
            piece_RX = reader.rows(name)
            values_ERX[expert, offset : offset + len(piece_RX)] = piece_RX
            filled += piece_RX.numel()
        offset += len(piece_RX)
    return filled


def _converted(
    target: WeightTarget, dtype: torch.dtype, reader: PieceReader, model: PreTrainedModel
) -> Iterator[tuple[str, Tensor]]:
    """The rare conversions (transposed, split, interleaved...), by transformers' own code; needs a second copy."""
    converter = deepcopy(target.converter)
    assert converter is not None
    for pattern, names in target.sources.items():
        for name in names:
            values = reader.rows(name).to(dtype)
            converter.add_tensor(target.name, name, pattern, values)  # type: ignore[arg-type]  # as when it saves
    for name, values in converter.convert(target.name, model=model, config=model.config).items():
        yield name, values[0] if isinstance(values, list) else values


class Reader(Protocol):
    """Anything that gives a tensor by its checkpoint name (storage.checkpoint.TensorReader)."""

    def get(self, name: str) -> Tensor: ...


def assemble(entry: TensorEntry, reader: Reader) -> Tensor:
    """The numbers of one neutral tensor, shape `entry.shape`, in the checkpoint's dtype."""
    if entry.layout == "per_expert":
        return torch.stack([reader.get(source) for source in entry.sources])
    source = reader.get(entry.sources[0])
    if entry.transposed:
        source = source.transpose(-1, -2)
    axis = halved_axis(entry)
    if entry.layout in ("first_half", "second_half"):
        half = source.shape[axis] // 2
        source = source.narrow(axis, 0 if entry.layout == "first_half" else half, half)
    elif entry.layout in ("even", "odd"):
        source = source[(slice(None),) * axis + (slice(int(entry.layout == "odd"), None, 2),)]
    return source.reshape(entry.shape)
