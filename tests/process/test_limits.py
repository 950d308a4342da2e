"""What a process may take: the machine's memory and cores, or less under a control group or `ulimit`."""

from pathlib import Path

import psutil
import pytest

from moe_edge.contracts.errors import InputRejected, ResourceProblem, exhaustion
from moe_edge.process import limits

MIB = 2**20


def files(root: Path, **contents: str) -> Path:
    """A file system's root with these files; in their names `__` stands for a slash and `DOT` for a dot."""
    for name, text in contents.items():
        path = root / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert limits.total_memory_bytes(tmp_path) == psutil.virtual_memory().total
    assert limits.available_cores(tmp_path) == limits.available_cores() >= 1


def test_version_two_binds_by_the_smallest_group_up_to_the_top_and_files_pages_count_as_free(tmp_path: Path) -> None:
    root = files(
        tmp_path,
        proc__self__cgroup="0::/a/b",
        sys__fs__cgroup__a__b__memoryDOTmax="max",
        sys__fs__cgroup__a__b__memoryDOTcurrent=str(100 * MIB),
        sys__fs__cgroup__a__memoryDOTmax=str(300 * MIB),
        sys__fs__cgroup__a__memoryDOTcurrent=str(200 * MIB),
        sys__fs__cgroup__a__memoryDOTstat=f"anon 1\ninactive_file {40 * MIB}\nactive_file {10 * MIB}",
        sys__fs__cgroup__a__cpuDOTmax="150000 100000",
    )
    assert limits.total_memory_bytes(root) == 300 * MIB
    assert limits.free_memory_bytes(root) == 150 * MIB
    assert limits.memory_text(root) == "150.0 MiB free of 300.0 MiB"
    assert limits.available_cores(root) == 1


def test_version_one_is_read_where_a_container_mounts_its_own_group_as_the_top(tmp_path: Path) -> None:
    root = files(
        tmp_path,
        proc__self__cgroup="5:cpu,cpuacct:/docker/x\n4:memory:/docker/x",
        sys__fs__cgroup__memory__memoryDOTlimit_in_bytes=str(600 * MIB),
        sys__fs__cgroup__memory__memoryDOTusage_in_bytes=str(700 * MIB),
        sys__fs__cgroup__memory__memoryDOTstat=f"total_inactive_file {50 * MIB}\ninactive_file 0",
    )
    assert limits.total_memory_bytes(root) == 600 * MIB
    assert limits.free_memory_bytes(root) == 0, "never less than nothing"


def test_no_limit_and_damaged_files_are_no_limit(tmp_path: Path) -> None:
    root = files(
        tmp_path,
        proc__self__cgroup="4:memory:/\n0::/../..",
        sys__fs__cgroup__memory__memoryDOTlimit_in_bytes=str(2**63 - 4096),
        sys__fs__cgroup__memoryDOTmax="banana",
    )
    assert limits.total_memory_bytes(root) == psutil.virtual_memory().total


def test_the_shells_limit_of_the_address_space_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used, unlimited = psutil.Process().memory_info().vms, limits.resource.RLIM_INFINITY
    sizes = {limits.resource.RLIMIT_AS: used + 64 * MIB}
    monkeypatch.setattr(limits.resource, "getrlimit", lambda kind: (sizes.get(kind, unlimited), unlimited))
    assert limits.free_memory_bytes(tmp_path) <= 72 * MIB
    assert limits.total_memory_bytes(tmp_path) == min(used + 64 * MIB, psutil.virtual_memory().total)


@pytest.mark.parametrize(
    ("error", "means_so"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (InputRejected("the file says: out of memory"), False),
        (ValueError("wrong shape"), False),
    ],
)
def test_exceptions_of_many_kinds_say_that_memory_or_threads_ran_out(error: Exception, means_so: bool) -> None:
    assert (exhaustion(error) is not None) == means_so
    outer = ValueError("the tokenizer cannot be read")
    outer.__cause__ = error
    assert (exhaustion(outer) is not None) == means_so


def test_memory_that_runs_out_is_said_with_the_stage_whichever_library_says_so(tmp_path: Path) -> None:
    blamed = InputRejected("the tokenizer cannot be read")
    with pytest.raises(InputRejected), limits.exhaustion_named("export", tmp_path):
        raise blamed
    with pytest.raises(
        ResourceProblem, match=r"the export stage ran out of memory[\s\S]*bad_alloc; before the stage .* free of"
    ):
        with limits.exhaustion_named("export", tmp_path):
            raise blamed from RuntimeError("std::bad_alloc")
