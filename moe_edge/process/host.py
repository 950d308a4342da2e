"""Facts about this machine that a number must carry: processor, cores, memory, governor, load, versions.

What cannot be read is null; nothing here changes a setting.
"""

import os
import platform
from pathlib import Path
from typing import Any

import psutil

from moe_edge.contracts.manifest import installed_version
from moe_edge.process.limits import available_cores, free_memory_bytes, total_memory_bytes

BUSY_CORES_NOTE = 0.2  # other processes' use above this share of one core is worth a note
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_PACKAGES = (
    "moe-edge",
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime-genai",
    "llama-cpp-python",
    "gguf",
    "numpy",
)


def threads_for(wanted: int | None) -> int:
    """The thread count of a target, never more than this machine has."""
    return min(wanted or available_cores(), available_cores())


def machine_facts() -> dict[str, Any]:
    """What does not change during a build."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "cpu": cpu_model(),
        "cores": available_cores(),
        "memory_bytes": total_memory_bytes(),
        "governor": _read(_GOVERNOR),
    }


def load_facts(sample_s: float = 0.5) -> dict[str, Any]:
    """How busy the machine is right now, before a measurement; call it while nothing of ours runs.

    Args:
        sample_s: seconds over which the use of the cores is sampled.
    """
    busy_cores = psutil.cpu_percent(interval=sample_s) / 100 * (psutil.cpu_count() or 1)
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    notes = []
    if busy_cores > BUSY_CORES_NOTE:
        notes.append(f"other processes used {busy_cores:.1f} cores when the measurement began: speeds are too low")
    return {
        "busy_cores_before": round(busy_cores, 2),
        "load_average_1min_before": load_average,
        "available_memory_bytes": free_memory_bytes(),
        "notes": notes,
    }


def versions() -> dict[str, str]:
    """Installed versions of what the numbers depend on."""
    return {"python": platform.python_version()} | {name: installed_version(name) for name in _PACKAGES}


def cpu_model() -> str | None:
    """The processor's name as the kernel spells it."""
    text = _read(Path("/proc/cpuinfo")) or ""
    names = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(("model name", "Model")))
    return next(names, platform.processor() or None)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
