"""What a stage receives and what it returns: folders with a manifest, and a typed summary for the report.

A stage is `run(context: StageContext) -> dict` : it writes its files under `context.out`, never outside, and returns a
JSON-able summary. The pipeline writes manifest.json last; the next stage sees only verified folders in `context.inputs`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
