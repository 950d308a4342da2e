"""Addresses, and the local transport's process handling."""

import sys
import time

import psutil
import pytest

from moe_edge.contracts.errors import ConfigError, DeviceProblem
from moe_edge.devices.transport import LocalTransport, open_transport


def test_local_runs_without_a_shell_and_returns_bytes() -> None:
    code = "import sys; data = sys.stdin.read(); print(data + sys.argv[1]); print('log', file=sys.stderr); sys.exit(3)"
    done = open_transport("local").run([sys.executable, "-c", code, "$HOME; `ls`"], b"in:", timeout_s=30)
    assert done.stdout.strip() == b"in:$HOME; `ls`"
    assert (done.returncode, done.stderr_tail, done.timed_out) == (3, "log\n", False)


def test_a_timeout_kills_the_whole_group(tmp_path: object) -> None:
    code = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    done = LocalTransport().run([sys.executable, "-c", code], b"", timeout_s=2)
    assert done.timed_out
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(done.stdout)) and time.monotonic() < deadline:
        if psutil.Process(int(done.stdout)).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    assert not psutil.pid_exists(int(done.stdout)) or psutil.Process(int(done.stdout)).status() == psutil.STATUS_ZOMBIE


def test_only_the_end_of_a_long_log_is_kept() -> None:
    done = LocalTransport().run([sys.executable, "-c", "import sys; sys.stderr.write('x' * 10**6 + 'end')"], b"", 30)
    assert len(done.stderr_tail) < 10_000
    assert done.stderr_tail.endswith("end")


def test_a_missing_program_is_a_device_problem() -> None:
    with pytest.raises(DeviceProblem, match="cannot start") as caught:
        LocalTransport().run(["/no/such/program"], b"", 5)
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("address", ["ssh://me@board", "ssh://me@board:2222", "adb:R58M"])
def test_remote_devices_are_refused_by_name(address: str) -> None:
    with pytest.raises(DeviceProblem, match="later version") as caught:
        open_transport(address)
    assert caught.value.exit_code == 7
    assert address in str(caught.value)


@pytest.mark.parametrize("address", ["", "lokal", "http://x"])
def test_other_words_are_a_wrong_configuration(address: str) -> None:
    with pytest.raises(ConfigError, match="unknown device"):
        open_transport(address)
