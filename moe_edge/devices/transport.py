"""How commands reach a device: the Transport protocol, and the one for this machine.

A transport runs an argument list on the device, feeds it bytes and brings its bytes back; it knows nothing of models or
samples. ssh and adb transports are further rows of TRANSPORTS with the same single method.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_edge.contracts.errors import ConfigError, DeviceProblem

STDERR_TAIL_CHARS = 4000


@dataclass(frozen=True)
class Completed:
    """What a command left behind; a negative return code is the signal that ended it."""

    returncode: int
    stdout: bytes
    stderr_tail: str
    timed_out: bool = False


class Transport(Protocol):
    """A way to run commands on one device."""

    address: str

    def run(self, argv: Sequence[str], stdin: bytes, timeout_s: float) -> Completed:
        """Run `argv` without a shell, wait, and return its output; never raises for a failing command."""
        ...


class LocalTransport:
    """This machine, in a fresh process group that dies as a whole on a timeout or an interrupt."""

    address = "local"

    def run(self, argv: Sequence[str], stdin: bytes, timeout_s: float) -> Completed:
        """Run a command here.

        Raises:
            DeviceProblem: the program cannot be started at all.
        """
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(list(argv), stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        except OSError as error:
            raise DeviceProblem(f"cannot start {argv[0]}", where=self.address, why=str(error)) from error
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout_s)
            return Completed(process.returncode, stdout, _tail(stderr))
        except subprocess.TimeoutExpired:
            stdout, stderr = _kill(process)
            return Completed(process.returncode, stdout, _tail(stderr), timed_out=True)
        except BaseException:
            _kill(process)
            raise


def _kill(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended between the timeout and the kill
    return process.communicate()


def _tail(stderr: bytes) -> str:
    return stderr.decode(errors="replace")[-STDERR_TAIL_CHARS:]


TRANSPORTS: dict[str, Callable[[], Transport]] = {"local": LocalTransport}


def open_transport(address: str) -> Transport:
    """The transport of a device address.

    Raises:
        DeviceProblem: the address names a remote device.
        ConfigError: it is no address at all.
    """
    if address in TRANSPORTS:
        return TRANSPORTS[address]()
    if address.startswith(("ssh://", "adb:")):
        raise DeviceProblem(
            f"this version measures on the local machine only, not on {address}",
            where="validate.device",
            why="the ssh and adb transports come with a later version",
            next_command="--device local here, or run `moe-edge bench ARTIFACT --device local` on the device itself",
        )
    raise ConfigError(
        f"unknown device '{address}'",
        where="validate.device",
        why="an address is local, ssh://user@host[:port] or adb:SERIAL",
        next_command="--device local",
    )
