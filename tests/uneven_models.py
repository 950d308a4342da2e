"""Models whose layers want different numbers of experts, and students whose layers have them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_edge.contracts.capabilities import PADDING
from moe_edge.models.loading import load_model, save_student
from moe_edge.models.padding import deciding_bias
from moe_edge.models.pruning import prune
from moe_edge.models.views import moe_layers
from tests.tiny import tiny_checkpoint

PADDABLE = tuple(PADDING)
SIZES: dict[str, Any] = {"experts": 8, "layers": 3}
_COUNTS = (6, 4, 4)  # kept by the MoE layers in turn; even numbers, for families with two groups


def uneven_choice(model: nn.Module) -> dict[int, list[int]]:
    """Decoder layer -> experts, another number in the first MoE layer than in the others, others in each layer."""
    kept = {}
    for view, count in zip(moe_layers(model), _COUNTS, strict=False):
        groups = view.groups[0]
        size = view.count // groups
        of_group = [sorted((place + view.position) % size for place in range(count // groups)) for _ in range(groups)]
        kept[view.index] = [group * size + place for group, ids in enumerate(of_group) for place in ids]
    return kept


def uneven_student(tmp_path: Path, family: str, **sizes: Any) -> tuple[Path, dict[int, list[int]]]:
    """A padded student's checkpoint, and what it kept of a teacher of 8 experts beside it in `tiny-FAMILY`."""
    teacher = tiny_checkpoint(tmp_path, family, **(SIZES | sizes))
    model = load_model(teacher)
    kept = uneven_choice(model)
    prune(model, kept, uneven=True)
    save_student(model, teacher, tmp_path / "student")
    return tmp_path / "student", kept


def skewed_teacher(tmp_path: Path, family: str, **sizes: Any) -> Path:
    """A teacher whose first MoE layer lives off two experts, while the others use all of theirs."""
    teacher = tiny_checkpoint(tmp_path, family, **(SIZES | sizes))
    model = load_model(teacher)
    with torch.no_grad():
        deciding_bias(moe_layers(model)[0]).tensor.view(-1)[[1, 6]] += 8.0
    save_student(model, teacher, tmp_path / "skewed")
    return tmp_path / "skewed"
