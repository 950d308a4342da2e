"""Several processes that share a stage: who this process is, and the ways in which they talk.

`accelerate launch --num_processes N` (or torchrun) starts N equal processes and tells each its number through the
environment. Rank 0 leads: it holds the lock, decides, merges and writes the results; the others only compute. They
meet in files; what goes over the process group is decisions and waiting, for which gloo serves on every machine, and the
gradients of a training. None outlives the others: where the leader fails the others end with its exit code, and whoever finds
that another one has gone says so.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from moe_edge.contracts.errors import EnvironmentProblem

Value = TypeVar("Value")
PATIENCE = timedelta(days=14)  # between the first process that has finished its share and the last


@dataclass(frozen=True)
class _Failed:
    """What the leader sends where it has no value to send."""

    exit_code: int


@dataclass(frozen=True)
class Ranks:
    """This process among those of the launch; one process alone is rank 0 of 1."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on this machine: which accelerator is its own
    local_world: int = 1  # how many share this machine's memory

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, value: Value) -> Value:
        """The leader's `value`, in every process; returns when the leader has come here.

        Raises:
            SystemExit: the leader failed in `lead`.
        """
        if self.world == 1:
            return value
        held: list[Any] = [value if self.leads else None]
        self._group().broadcast_object_list(held, src=0)
        if isinstance(held[0], _Failed) and not self.leads:
            raise SystemExit(held[0].exit_code)
        shared: Value = held[0]
        return shared

    def lead(self, work: Callable[[], Value]) -> Value:
        """What `work` returns in the leader, in every process; the others only wait.

        Raises:
            SystemExit: not in the leader, where `work` failed in the leader: quietly, because the leader says why.
        """
        if not self.leads:
            return self.share(None)  # type: ignore[return-value]  # the leader's value
        try:
            value = work()
        except Exception as error:
            with suppress(RuntimeError):  # the others may be gone, and the leader's own error is the one to tell
                self.share(_Failed(getattr(error, "exit_code", 1)))
            raise
        return self.share(value)

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.world > 1:
            self._group().barrier()

    def _group(self) -> Any:
        from torch import cuda, distributed

        if not distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if cuda.is_available() and distributed.is_nccl_available() else "gloo"
            distributed.init_process_group(backend, rank=self.rank, world_size=self.world, timeout=PATIENCE)
        return distributed

    def take_accelerator(self) -> None:
        """Make this process's own accelerator the current one, so that "cuda" means that one."""
        from torch import cuda

        if self.world > 1 and cuda.is_available():
            cuda.set_device(self.local_rank % cuda.device_count())


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """Say in words what the process group says in its own when another process has gone.

    Raises:
        EnvironmentProblem: that has happened in the block.
    """
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error).lower() and "nccl" not in str(error).lower():
            raise
        raise EnvironmentProblem(
            "another process of this launch has ended",
            why="its own message says why",
            next_command="the same command resumes where it stopped",
        ) from error


def current_ranks() -> Ranks:
    """What the launcher says; rank 0 of 1 where there is none."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(os.environ.get(name, "").isdigit() for name in names[:2]):
        return Ranks()
    rank, world = (int(os.environ[name]) for name in names[:2])
    local_rank, local_world = (
        int(os.environ.get(name, default)) for name, default in zip(names[2:], (rank, world), strict=True)
    )
    return Ranks(rank, world, local_rank, local_world)
