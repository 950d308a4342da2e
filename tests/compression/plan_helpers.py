"""What the planner's tests share: tiny models seen from their headers, and configurations with budgets."""

from pathlib import Path
from typing import Any

from moe_edge.compression.headers import ModelHeaders, model_headers
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.config_io import resolve_config
from moe_edge.contracts.targets_io import read_target
from moe_edge.storage.checkpoint import CheckpointHeaders, inspect_checkpoint
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
