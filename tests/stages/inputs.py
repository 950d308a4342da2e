"""What stages are given, made of folders that a test has written."""

from pathlib import Path

from moe_edge.api import open_teacher
from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.config_io import resolve_config
from moe_edge.contracts.targets_io import read_target


def opened(folder: Path) -> Teacher:
    """A checkpoint folder as a teacher."""
    return open_teacher(resolve_config(read_target("cpu"), overrides={"teacher.path": str(folder)}))
