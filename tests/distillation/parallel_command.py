"""Started by torchrun: the command line, with what a test cannot ask of it; see test_parallel_command.

SHARD: accelerate shards weights on accelerators only, so they are sharded here. DIE_AT: before this step of a stage the process
DIE_RANK is killed. SAVE_ALWAYS: the leader's clock asks for a checkpoint after every step, the others' never.
"""

import os
import signal
import sys

from transformers import TrainerCallback

from moe_edge.cli import main as cli
from moe_edge.distillation import recovery
from moe_edge.distillation.checkpoints import SaveByTheClock
from tests.distillation.parallel_run import shard_on_cpu


class Die(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == int(os.environ["DIE_AT"]) and os.environ["RANK"] == os.environ["DIE_RANK"]:
            os.kill(os.getpid(), signal.SIGKILL)


class Trainer(recovery.DistillationTrainer):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        if "SHARD" in os.environ:
            shard_on_cpu(self, "OlmoeDecoderLayer")
        if "DIE_AT" in os.environ:
            self.add_callback(Die())


def main() -> None:
    recovery.DistillationTrainer = Trainer  # type: ignore[misc]
    if "SAVE_ALWAYS" in os.environ:
        interval_s = 0.0 if os.environ["RANK"] == "0" else 1e9
        recovery.SaveByTheClock = lambda _: SaveByTheClock(interval_s)  # type: ignore[misc,assignment]
    cli.main(sys.argv[1:])


if __name__ == "__main__":
    main()
