"""What an export works on: everything that is decided before the first byte is written."""

from dataclasses import dataclass
from pathlib import Path

from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.spec import ModelSpec
from moe_edge.export.golden import Prompt
from moe_edge.storage.statistics import Statistics


@dataclass(frozen=True)
class Job:
    """One checkpoint, the files to make of it, and what they are made with."""

    model: Path
    out: Path
    name: str
    spec: ModelSpec
    params_total: int
    formats: tuple[str, ...]
    recipes: tuple[str, ...]
    precision: str
    config: BuildConfig
    statistics: Statistics | None
    kept: dict[int, list[int]] | None
    provenance: dict[str, str]
    mix: dict[str, str]  # of the main recipe: types per class that the plan chose instead of the recipe's
    notes: tuple[str, ...] = ()
    prompts: list[Prompt] | None = None  # golden ones with the teacher's answers; None: the model answers itself


@dataclass(frozen=True)
class Reopened:
    """One exported file to judge."""

    kind: str  # its row's name: "gguf Q4_K_M"
    runtime: str
    path: Path
    delivered: str | None = None  # its place in the build's folder, where it is delivered
    student: Path | None = None  # what it is compared with, where that is not the student: its first layers
