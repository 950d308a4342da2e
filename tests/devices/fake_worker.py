"""A worker process on a fake runtime, for the harness tests: `python fake_worker.py [how to misbehave]`."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from moe_edge.contracts.errors import InputRejected, ResourceProblem
from moe_edge.devices import worker

VOCAB = 16


class FakeRuntime:
    """Always continues with the next id; prints to stdout as native libraries do."""

    vocab = VOCAB
    repacks: bool | None = None

    def prefill(self, ids_S: np.ndarray) -> np.ndarray:
        assert ids_S.min() >= 0 and ids_S.max() < VOCAB
        os.write(1, b"a native library talks\n")
        time.sleep(0.002)
        return self.step(int(ids_S[-1]))

    def step(self, token: int) -> np.ndarray:
        time.sleep(0.0005)
        return np.eye(VOCAB, dtype=np.float32)[(token + 1) % VOCAB]

    def close(self) -> None:
        pass


def _hang() -> None:
    time.sleep(60)


def _reject() -> None:
    raise InputRejected("this file is no model", where="x.gguf")


def _too_large() -> None:
    raise ResourceProblem("not measured: the model does not fit into memory")


def _no_memory() -> None:
    raise MemoryError("cannot allocate 9 GiB")


MISBEHAVIOUR = {
    "hang": _hang,
    "reject": _reject,
    "memory": _no_memory,
    "large": _too_large,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "illegal": lambda: os.kill(os.getpid(), signal.SIGILL),
    "raise": lambda: 1 / 0,
}


def open_fake(kind: str, path: str, threads: int, context_length: int) -> Any:
    if mode := next((name for name in MISBEHAVIOUR if name in Path(path).name), None):
        MISBEHAVIOUR[mode]()
    runtime = FakeRuntime()
    if "amx" in Path(path).name:
        runtime.repacks = False
    return runtime


if __name__ == "__main__":
    sys.exit(worker.main(open_fake))
