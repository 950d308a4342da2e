"""The errors a user can meet, each with the exit code of the command line.

An error says what went wrong, where, why, and which command to run next; `str(error)` is the whole message. Anything that
is not a MoeEdgeError is a bug in moe-edge and leaves with exit code 1, unless the machine had nothing left to give: libraries say
so in exceptions of many types, which `exhaustion` knows.
"""

import errno
import os
import unicodedata


def visible(text: str) -> str:
    """`text` with a `?` for every character that steers a terminal, except line breaks and tabs: names come from outside."""
    return "".join(
        "?" if unicodedata.category(one) in ("Cc", "Cf", "Cs") and one not in "\n\t" else one for one in text
    )


class MoeEdgeError(Exception):
    """Base of all errors that are reported to the user without a traceback."""

    exit_code = 1

    def __init__(
        self, what: str, *, where: str | None = None, why: str | None = None, next_command: str | None = None
    ) -> None:
        self.what, self.where, self.why, self.next_command = what, where, why, next_command
        parts = [what]
        if where:
            parts.append(f"  where: {where}")
        if why:
            parts.append(f"  why:   {why}")
        if next_command:
            parts.append(f"  next:  {next_command}")
        super().__init__("\n".join(parts))


class ConfigError(MoeEdgeError):
    """Wrong usage or configuration: an unknown key or target, a missing folder, an impossible value."""

    exit_code = 2


class InfeasibleError(MoeEdgeError):
    """No plan meets the target's budget."""

    exit_code = 3


class InputRejected(MoeEdgeError):
    """The input is corrupt, unsafe or unsupported."""

    exit_code = 4


class EnvironmentProblem(MoeEdgeError):
    """A missing dependency, or an output folder that another build holds."""

    exit_code = 5


class ResourceProblem(MoeEdgeError):
    """Not enough disk or memory."""

    exit_code = 6


# How Python, libstdc++, torch, onnxruntime, llama.cpp, safetensors and the loader say that memory or threads have run out.
EXHAUSTED_TEXTS = (
    "MemoryError",
    "bad_alloc",
    "bad allocation",
    "out of memory",
    "cannot allocate memory",
    "can't allocate memory",
    "failed to allocate",
    "unable to allocate",
    "can't start new thread",
    "failed to map segment from shared object",
)


def says_exhausted(text: str) -> bool:
    """Does the message of a library mean that memory or threads have run out?"""
    lower = text.lower()
    return any(known.lower() in lower for known in EXHAUSTED_TEXTS)


def exhaustion(error: BaseException) -> str | None:
    """What an exception or one of its causes says about memory or threads that have run out; None: something else failed."""
    seen: BaseException | None = error
    while seen is not None:
        if _is_exhaustion(seen):
            return str(seen).strip().partition("\n")[0] or type(seen).__name__
        seen = seen.__cause__
    return None


def _is_exhaustion(error: BaseException) -> bool:
    if isinstance(error, MoeEdgeError):
        return False  # it has said what it means; its cause has not
    if isinstance(error, OSError) and error.errno is not None:
        no_process = error.errno == errno.EAGAIN and error.strerror == os.strerror(errno.EAGAIN)  # of fork
        return error.errno == errno.ENOMEM or no_process
    return isinstance(error, MemoryError) or (isinstance(error, Exception) and says_exhausted(str(error)))


class DeviceProblem(MoeEdgeError):
    """A device or its transport failed."""

    exit_code = 7


class GateFailed(MoeEdgeError):
    """The build finished, but an artifact missed a quality or speed gate."""

    exit_code = 10
