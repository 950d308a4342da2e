"""Distillation as a library: `DistillationTrainer`, its arguments and what it is given (rows, the teacher from a cache or in
memory, terms and hooks); the stage that a build runs is in stages/distill.py.

Names are loaded when they are asked for, because a command that never trains should not wait for the training loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_edge.distillation.signal import CachedSignal
    from moe_edge.distillation.teacher import LiveTeacher
    from moe_edge.distillation.trainer import DistillationTrainer, DistillationTrainingArguments, Parts, RowDataset

_HOMES = {
    "CachedSignal": "signal",
    "DistillationTrainer": "trainer",
    "DistillationTrainingArguments": "trainer",
    "LiveTeacher": "teacher",
    "Parts": "trainer",
    "RowDataset": "trainer",
}
__all__ = [
    "CachedSignal",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "LiveTeacher",
    "Parts",
    "RowDataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
