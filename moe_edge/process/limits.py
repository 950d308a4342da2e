"""What this process may use of the machine: memory and cores, under the limits of its container and its shell.

A container sees the whole machine's memory and is killed without a word when it takes more than its control group may, so
everything that asks how much memory is free asks here. Limits come from control groups (versions 1 and 2, every group from the
process's own up to the root, because each of them binds) and from `ulimit -v` and `ulimit -d`. What cannot be read is no limit.

Sources: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of the Linux kernel; getrlimit(2).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import psutil

from moe_edge.contracts.errors import ResourceProblem, exhaustion
from moe_edge.contracts.units import format_bytes

try:
    import resource
except ImportError:  # no such limits on Windows
    resource = None  # type: ignore[assignment]

ROOT = Path("/")
_GROUPS = "sys/fs/cgroup"
_UNLIMITED_BYTES = 1 << 60  # version 1 writes the largest multiple of a page for "no limit"


def free_memory_bytes(root: Path = ROOT) -> int:
    """Memory that this process can still take: what the machine has available, or less where a limit leaves less.

    Args:
        root: of the file system in which the control groups are read.
    """
    groups = [max(limit - used, 0) for limit, used in _memory_groups(root)]
    own = [max(limit - used, 0) for limit, used in _own_limits()]
    return min((int(psutil.virtual_memory().available), *groups, *own))


def total_memory_bytes(root: Path = ROOT) -> int:
    """Memory that this process may have in all: the machine's, or the smallest limit."""
    limits = [limit for limit, _ in (*_memory_groups(root), *_own_limits())]
    return min((int(psutil.virtual_memory().total), *limits))


def memory_text(root: Path = ROOT) -> str:
    """Both for a message, e.g. '310.2 MiB free of 512.0 MiB'."""
    return f"{format_bytes(free_memory_bytes(root))} free of {format_bytes(total_memory_bytes(root))}"


@contextmanager
def exhaustion_named(stage: str, folder: Path) -> Iterator[None]:
    """Say of a stage that found no memory or no thread that it did, with what was free before it began.

    Raises:
        ResourceProblem: instead of any exception that means so, also of one that blames the input for it.
    """
    before = memory_text()
    try:
        yield
    except ResourceProblem:
        raise
    except Exception as error:
        if (why := exhaustion(error)) is None:
            raise
        raise ResourceProblem(
            f"the {stage} stage ran out of memory or threads",
            where=str(folder),
            why=f"{why}; before the stage {before}",
            next_command="a machine or container with more memory (docker --memory, ulimit -v, ulimit -u); "
            "the same command resumes where it stopped",
        ) from error


def available_cores(root: Path = ROOT) -> int:
    """Cores that this process may use: those of its affinity, or the whole ones of its control groups' quotas."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min((cores, *(int(quota) for quota in _core_quotas(root)))))


def _own_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of the address space and of the data segment, where they are limited."""
    if resource is None:
        return
    memory = psutil.Process().memory_info()
    for kind, used in ((resource.RLIMIT_AS, memory.vms), (resource.RLIMIT_DATA, getattr(memory, "data", 0))):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit, used


def _memory_groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of every control group that limits memory; pages of files count as unused: they are given up."""
    for folder in _groups(root, "memory"):
        current = _number(folder / "memory.current")
        used = current if current is not None else _number(folder / "memory.usage_in_bytes")
        limits = [_number(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        for limit in limits:
            if limit is not None and limit < _UNLIMITED_BYTES:
                yield limit, max((used or 0) - _file_pages_bytes(folder), 0)


def _file_pages_bytes(folder: Path) -> int:
    rows = dict(row for line in _text(folder / "memory.stat").splitlines() if len(row := line.split()) == 2)
    names = ("inactive_file", "active_file")
    prefix = "total_" if "total_inactive_file" in rows else ""  # version 1: with the groups below
    return sum(int(rows.get(prefix + name, "0")) for name in names)


def _core_quotas(root: Path) -> Iterator[float]:
    """Cores by the quotas of the control groups."""
    for folder in _groups(root, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            yield int(quota) / int(period)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups of a controller, up to the top.

    A container may see its group's path as the host names it and yet have only its own group mounted, as the top: folders that
    are not there hold no files, and the top is always among those that are read.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0" and not controllers:
            tops = [root / _GROUPS, root / _GROUPS / "unified"]
        elif controller in controllers.split(","):
            tops = [root / _GROUPS / folder for folder in dict.fromkeys((controller, controllers))]
        else:
            continue
        path = PurePosixPath(*(part for part in PurePosixPath(name).parts if part not in ("/", "..")))
        for top in tops:
            yield from (top / group for group in (path, *path.parents))


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
