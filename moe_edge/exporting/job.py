"""What an export works on and what it makes: everything that is decided before the first byte, and the files for the judge.

`ExportJob` is one checkpoint with the names, formats and types that were settled for it. Each format's half (gguf_files,
onnx_files) turns it into `WrittenFiles`: the artifacts that the build delivers, and the files that parity reopens.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_edge.contracts.artifacts import ExportedArtifact
from moe_edge.contracts.capabilities import RUNTIME_OF_FORMAT, refusals, require_exportable
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.spec import ModelSpec
from moe_edge.exporting.golden import Prompt
from moe_edge.process.host import threads_for
from moe_edge.storage.statistics import Statistics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportJob:
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

    @property
    def threads(self) -> int:
        """Of the quantizer and of the runtimes that reopen the files."""
        return threads_for(self.config.target.runtime.threads)

    @property
    def reference(self) -> Path:
        """The folder of the full-precision files, on which parity is judged and which are not delivered."""
        return self.out / "reference"

    def bits_per_weight(self, size_bytes: int) -> float:
        """Of an artifact of the whole model."""
        return round(8 * size_bytes / self.params_total, 3)


@dataclass(frozen=True)
class ExportedFile:
    """One written file to reopen and to judge."""

    kind: str  # its row's name: "gguf Q4_K_M"
    runtime: str
    path: Path
    delivered: str | None = None  # its place in the build's folder, where it is delivered
    student: Path | None = None  # what it is compared with, where that is not the student: its first layers


@dataclass(frozen=True)
class WrittenFiles:
    """What one format's half of an export made, each list in the order of the report's rows."""

    artifacts: list[ExportedArtifact]
    files: list[ExportedFile]
    notes: list[str]


def formats_to_write(config: BuildConfig, spec: ModelSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The formats to write, and a note on each of the target's that cannot hold a dense student.

    A mixture is refused as a plan refuses its teacher; a dense student, made of a teacher that passed, loses the format.

    Raises:
        InputRejected: a format that was asked for by name, or every one, cannot hold the model.
    """
    asked = config.target.formats if config.export.formats == "auto" else config.export.formats
    if spec.moe_layers:
        require_exportable(spec, asked)
        return tuple(asked), ()
    reasons = {name: refusals(RUNTIME_OF_FORMAT[name], spec) for name in asked}
    possible = tuple(name for name in asked if not reasons.get(name))
    notes = tuple(f"{name} was left out: {'; '.join(why)}" for name, why in reasons.items() if why)
    if notes and (config.export.formats != "auto" or not possible):
        raise InputRejected("this dense student cannot be exported", where=f"a {spec.family} checkpoint", why=notes[0])
    return possible, notes


def size_name(spec: ModelSpec) -> str:
    """What a file's name says of the experts: '5e', '5e-uneven' (on average), or 'dense'."""
    counts = spec.moe.experts_per_layer
    if counts:
        return f"{round(sum(counts) / len(counts))}e-uneven"
    return f"{spec.moe.experts}e" if spec.moe_layers else "dense"


def write_once(path: Path, write: Callable[[Path], object]) -> None:
    """Write `path` unless an earlier, killed run finished it (writers rename whole files into place)."""
    if path.exists():
        log.info("%s: already written", path.name)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
