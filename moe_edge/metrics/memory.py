"""Peak memory of a process tree: a background sampler, and the kernel's own high-water mark where it can be read.

Sampling sees short peaks only by luck, and costs a little time; `high_water_bytes` sees every peak of one process at no
cost, but from its start on. The harness uses both and never samples while it takes times.
"""

import threading
from pathlib import Path
from typing import Self

import psutil

MIB = 2**20


def tree_rss_bytes(process: psutil.Process) -> int:
    """Resident memory of a process and its descendants, bytes; processes that end meanwhile count 0."""
    return sum(_rss_bytes(member) for member in [process, *_children(process)])


def uss_bytes(process: psutil.Process) -> int | None:
    """Memory that only this process holds, bytes; None where the system does not tell."""
    try:
        return int(process.memory_full_info().uss)
    except (psutil.Error, AttributeError):
        return None


def high_water_bytes() -> int | None:
    """Largest resident size of this process since it started (VmHWM), bytes; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _rss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


class PeakRss:
    """Context manager that samples the process tree's RSS, and this process's USS if asked.

    >>> with PeakRss() as peak: work()
    >>> peak.peak_rss_mib, peak.above_baseline_mib

    Args:
        interval_s: seconds between samples.
        uss: also sample USS, ten times less often, because the kernel walks every page for it.
    """

    def __init__(self, interval_s: float = 0.03, uss: bool = False) -> None:
        self._interval_s, self._uss = interval_s, uss
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-rss", daemon=True)
        self.baseline_bytes = 0
        self.peak_bytes = 0
        self.peak_uss_bytes: int | None = None

    def __enter__(self) -> Self:
        self.baseline_bytes = self.peak_bytes = tree_rss_bytes(self._process)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look(with_uss=self._uss)

    @property
    def peak_rss_mib(self) -> float:
        """Largest sampled resident size of the tree."""
        return self.peak_bytes / MIB

    @property
    def above_baseline_mib(self) -> float:
        """How far the peak rose over the size at entry."""
        return (self.peak_bytes - self.baseline_bytes) / MIB

    def _sample(self) -> None:
        count = 0
        while not self._stop.wait(self._interval_s):
            self._look(with_uss=self._uss and count % 10 == 0)
            count += 1

    def _look(self, with_uss: bool) -> None:
        self.peak_bytes = max(self.peak_bytes, tree_rss_bytes(self._process))
        if with_uss:
            now_bytes = uss_bytes(self._process)
            if now_bytes is not None:
                self.peak_uss_bytes = max(self.peak_uss_bytes or 0, now_bytes)
