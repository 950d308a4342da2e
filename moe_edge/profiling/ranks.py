"""Several processes that share one pass: who this process is, and the two ways in which they talk.

`accelerate launch --num_processes N` (or torchrun) starts N equal processes and tells each its number through the
environment. Rank 0 leads: it holds the lock, decides, merges and writes the results; the others only compute. They
meet in files; what goes over the process group is decisions and waiting, so that gloo serves on every machine.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

Value = TypeVar("Value")
PATIENCE = timedelta(days=14)  # between the first process that has finished its share and the last


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
        """The leader's `value`, in every process; returns when the leader has come here."""
        if self.world == 1:
            return value
        held: list[Any] = [value if self.leads else None]
        self._group().broadcast_object_list(held, src=0)
        shared: Value = held[0]
        return shared

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.world > 1:
            self._group().barrier()

    def _group(self) -> Any:
        from torch import distributed

        if not distributed.is_initialized():
            distributed.init_process_group("gloo", rank=self.rank, world_size=self.world, timeout=PATIENCE)
        return distributed


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
