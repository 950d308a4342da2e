"""The memory sampler on allocations of a known size."""

import subprocess
import sys

import numpy as np
import psutil

from moe_edge.metrics.memory import MIB, PeakRss, high_water_bytes, tree_rss_bytes, uss_bytes

SIZE_MIB = 96


def test_a_freed_allocation_is_seen() -> None:
    with PeakRss(interval_s=0.005, uss=True) as peak:
        block = np.ones(SIZE_MIB * MIB, dtype=np.uint8)
        for _ in range(200):
            block += 1  # keeps it resident while the sampler looks
            if peak.above_baseline_mib > 0.9 * SIZE_MIB:
                break
        del block
    assert 0.8 * SIZE_MIB < peak.above_baseline_mib < 2 * SIZE_MIB
    assert peak.peak_rss_mib > peak.above_baseline_mib
    assert peak.peak_uss_bytes and peak.peak_uss_bytes > 0


def test_the_kernels_mark_is_at_least_what_is_resident() -> None:
    assert high_water_bytes() >= psutil.Process().memory_info().rss * 0.9


def test_children_count_and_ended_processes_do_not() -> None:
    code = "x = bytearray(64 * 2**20); x[::4096] = b'1' * len(x[::4096]); print('ready', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"ready\n"
        own = psutil.Process().memory_info().rss
        assert tree_rss_bytes(psutil.Process()) > own + 60 * MIB
        handle = psutil.Process(child.pid)
    finally:
        child.communicate(b"\n")
    assert tree_rss_bytes(handle) == 0
    assert uss_bytes(handle) is None
