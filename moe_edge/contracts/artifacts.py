"""What a stage receives and what it returns: folders with a manifest, and a typed summary for the report.

A stage is `run(context: StageContext) -> dict` : it writes its files under `context.out`, never outside, and returns a
JSON-able summary. The pipeline writes manifest.json last; the next stage sees only verified folders in `context.inputs`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from moe_edge.contracts.config import BuildConfig


@dataclass(frozen=True)
class StageContext:
    """Everything a stage may use.

    `inputs` maps an earlier stage's name to its finished folder; `summaries` to what it returned.
    `out` survives a kill, so that a stage can resume from what it finds there: the pipeline empties it when the key changed.
    """

    config: BuildConfig
    teacher: Path
    teacher_digest: str
    out: Path
    inputs: dict[str, Path] = field(default_factory=dict)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)


StageRun = Callable[[StageContext], dict[str, Any]]


class ExportedArtifact(BaseModel):
    """One delivered file or folder of an export, as its summary tells it.

    `to_json` leaves out what the format does not have: an ONNX folder has no parts and no fallbacks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["gguf", "onnx"]
    runtime: Literal["llama_cpp", "ort"]
    path: str  # below the build's folder; of a file in parts, the first one
    quantization: str  # recipe or precision, with "-mix" where classes or layers have types of their own
    bytes: int
    bits_per_weight: float
    files: list[str] | None = None  # all parts
    bytes_by_class: dict[str, int]
    bits_per_weight_by_class: dict[str, float]
    fallbacks: dict[str, int] | None = None  # "Q4_K -> Q5_0": tensors whose rows do not fit the recipe's type

    def to_json(self) -> dict[str, Any]:
        """As plain data; the constructor reads it again."""
        return self.model_dump(exclude_none=True)
