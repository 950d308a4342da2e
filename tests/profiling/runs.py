"""Passes over a tiny teacher, whole and layer by layer, for the tests of this room."""

from pathlib import Path
from typing import Any

import torch

from moe_edge.models.loading import load_model
from moe_edge.models.streaming import StreamedModel
from moe_edge.profiling.layerwise import run_layerwise
from moe_edge.profiling.passes import SHARD_ROWS, OnLogits, run_pass, share_of
from moe_edge.profiling.sums import PassSums
from tests.tiny import tiny_ids

ROWS, TOKENS, CKA_TOKENS = 2 * SHARD_ROWS + 3, 16, 6 * 16


class Killed(Exception):
    """Stands for kill -9."""


def whole_pass(folder: Path, partial: Path, on_logits: OnLogits | None = None, **changes: Any) -> PassSums:
    """The pass of `load_model(folder)`; `changes`: dtype, identity, cka_tokens, rank, world."""
    model = load_model(folder, changes.pop("dtype", torch.float32))
    identity = {"x": changes.pop("identity", "a")}
    return run_pass(model, _work(**changes), partial=partial, identity=identity, on_logits=on_logits)


def layerwise_pass(folder: Path, partial: Path, on_logits: OnLogits | None = None, **changes: Any) -> PassSums:
    """The same, layer by layer, as the stage does it."""
    teacher = StreamedModel(folder, changes.pop("dtype", torch.float32), compact=True)
    identity = {"x": changes.pop("identity", "a")}
    return run_layerwise(teacher, _work(**changes), partial=partial, identity=identity, on_logits=on_logits)


def _work(cka_tokens: int = CKA_TOKENS, **changes: int) -> Any:
    return share_of(tiny_ids(TOKENS, ROWS).int().numpy(), cka_tokens, **changes)


def flat(sums: PassSums) -> dict[str, torch.Tensor]:
    """All tensors under one name each."""
    layers = {f"{i}.{name}": tensor for i, layer in enumerate(sums.layers) for name, tensor in layer.items()}
    return layers | sums.model


def same_bits(one: PassSums, other: PassSums) -> bool:
    """Are all sums equal in every bit?"""
    first, second = flat(one), flat(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
