"""Distillation as a library: `DistillationTrainer` and its arguments; the stage that a build runs is in stages/distill.py.

Names are loaded when they are asked for, because a command that never trains should not wait for the training loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_edge.distillation.trainer import DistillationTrainer, DistillationTrainingArguments

_HOMES = {"DistillationTrainer": "trainer", "DistillationTrainingArguments": "trainer"}
__all__ = ["DistillationTrainer", "DistillationTrainingArguments"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
