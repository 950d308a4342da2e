"""What a command leaves behind: a build's folder with its typed parts, and the files that a user ships. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moe_edge.contracts.artifacts import (
    CompressFolder,
    DistillFolder,
    ExportFolder,
    ExportSummary,
    PlanFolder,
    ProfileFolder,
)
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.plan import Plan
from moe_edge.contracts.report import Report


@dataclass(frozen=True)
class DeliveredModel:
    """One file, or folder, that a user ships."""

    path: Path
    format: Literal["gguf", "onnx"]
    quantization: str
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Artifacts:
    """What lies in artifacts/, the main file of each format first."""

    gguf: tuple[DeliveredModel, ...]
    onnx: tuple[DeliveredModel, ...]
    hf: Path  # the student as a plain transformers checkpoint


@dataclass(frozen=True)
class Run:
    """A build's folder after `build`, `export` or another command that fills it."""

    out: Path
    config: BuildConfig
    report: Report | None = None  # None where the build was stopped before its end
    reused: Mapping[str, bool] = field(default_factory=dict)  # stage -> was it up to date
    exported: ExportSummary | None = None  # of an export without a build

    @property
    def profile(self) -> ProfileFolder:
        return ProfileFolder.open(self.out / "profile")

    @property
    def plan(self) -> Plan:
        return PlanFolder.open(self.out / "plan").plan

    @property
    def compressed(self) -> CompressFolder:
        return CompressFolder.open(self.out / "compress")

    @property
    def student(self) -> DistillFolder:
        return DistillFolder.open(self.out / "distill")

    @property
    def artifacts(self) -> Artifacts:
        """The delivered files. Raises ConfigError where nothing was exported."""
        found: dict[str, list[DeliveredModel]] = {"gguf": [], "onnx": []}
        exported = self.exported or ExportFolder.open(self.out / "export").summary
        for row in exported.artifacts:
            model = DeliveredModel(self.out / row.path, row.format, row.quantization, row.bytes, row.bits_per_weight)
            found[row.format].append(model)
        return Artifacts(tuple(found["gguf"]), tuple(found["onnx"]), self.out / "artifacts" / "hf")
