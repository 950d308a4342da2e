"""`moe-edge doctor`: is this machine ready to build, and if not, what repairs it.

Every line is a check that can fail; a runtime counts as present only when it can be imported.
"""

import importlib
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_edge.contracts.manifest import installed_version
from moe_edge.contracts.units import format_bytes
from moe_edge.process.limits import available_cores, free_memory_bytes, memory_text

LEAST_MEMORY_BYTES = 4 << 30
LEAST_DISK_BYTES = 5 << 30
MODULES = {
    "torch": "torch", "transformers": "transformers", "llama-cpp-python": "llama_cpp", "onnxruntime": "onnxruntime",
    "onnxruntime-genai": "onnxruntime_genai", "gguf": "gguf", "h5py": "h5py",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    finding: str
    fix: str = ""


def examine() -> list[Finding]:
    """Every check, in the order in which a build needs them."""
    modules = [_module(package, module) for package, module in MODULES.items()]
    return [_python(), *modules, _memory(), _disk(), _guarded("demo teacher", _demo), _guarded("targets", _targets)]


def _python() -> Finding:
    return Finding("python", True, f"{platform.python_version()} on {platform.machine()}, {available_cores()} cores")


def _module(package: str, module: str) -> Finding:
    try:
        importlib.import_module(module)
    except Exception as error:  # an extension can fail to load in many ways; all mean that it cannot be used
        return Finding(package, False, f"cannot be imported: {error}", "pip install -c constraints.txt .")
    return Finding(package, True, installed_version(package))


def _memory() -> Finding:
    enough = free_memory_bytes() >= LEAST_MEMORY_BYTES
    return Finding("memory", enough, memory_text(), "close other programs, or raise the container's limit")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    return Finding(
        "disk",
        free >= LEAST_DISK_BYTES,
        f"{format_bytes(free)} free here",
        "free some space or build elsewhere with --out",
    )


def _guarded(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except Exception as error:
        return Finding(name, False, str(error).splitlines()[0], "pip install --force-reinstall -c constraints.txt .")


def _demo() -> str:
    from moe_edge.demo import demo_teacher_path
    from moe_edge.storage.checkpoint import inspect_checkpoint

    return f"{format_bytes(inspect_checkpoint(demo_teacher_path()).total_bytes)} at {demo_teacher_path()}"


def _targets() -> str:
    from moe_edge.contracts.targets_io import list_targets, load_target

    return ", ".join(load_target(name).name for name in list_targets())
