"""What the planner's tests share: tiny models seen from their headers, and configurations with budgets."""

from pathlib import Path
from typing import Any

from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.config_io import resolve_config
from moe_edge.contracts.quantization import CODEBOOK_CLASSES, CODEBOOK_LEVELS
from moe_edge.contracts.targets_io import read_target
from moe_edge.planning.bits import Sensitivity, prior_sensitivity
from moe_edge.planning.headers import ModelHeaders, model_headers
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.tiny import tiny_checkpoint

FIXED_HARDWARE = ("target.hardware.memory_bytes={value: 8000000000.0, source: a test, confidence: assumed}",)
NO_SHARE = "target.budget.experts=null"


def config(*settings: str, target: str = "cpu") -> BuildConfig:
    """A resolved configuration whose result does not depend on the machine of the test."""
    hardware = FIXED_HARDWARE if target == "cpu" else ()
    return resolve_config(read_target(target), settings=[*hardware, *settings])


def headers(folder: Path, family: str = "qwen3_moe", **sizes: Any) -> CheckpointHeaders:
    """Headers of a tiny checkpoint; by default the routed experts are most of it."""
    wanted: dict[str, Any] = {"experts": 8, "hidden": 256, "width": 256, "top_k": 2} | sizes
    return inspect_checkpoint(tiny_checkpoint(folder, family, **wanted))


def model(folder: Path, family: str = "qwen3_moe", **sizes: Any) -> ModelHeaders:
    return model_headers(headers(folder, family, **sizes))


def with_codebooks(model: ModelHeaders) -> Sensitivity:
    """The prior, with the codebook types for the experts by their noise."""
    prior = prior_sensitivity(model)
    offered = {cell: CODEBOOK_LEVELS if cell[0] in CODEBOOK_CLASSES else () for cell in prior.nats}
    nats = {
        cell: {kind: prior.of(cell, kind) for kind in offered[cell]} | dict(table) for cell, table in prior.nats.items()
    }
    return Sensitivity(nats, "measured", 8)
