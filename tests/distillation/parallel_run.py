"""Started by torchrun: trains the tiny student on the tiny teacher's cache in one or more processes; see test_parallel.

torchrun --nproc-per-node N parallel_run.py FOLDER ddp|fsdp
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from moe_edge.distillation.signal import CachedSignal
from moe_edge.distillation.trainer import DistillationTrainer, DistillationTrainingArguments, RowDataset
from tests.distillation.parts import rows, tiny_student

BATCH_ROWS = 4


def main(folder: Path, backend: str) -> None:
    torch.manual_seed(0)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    out = folder / f"{backend}-{processes}"
    arguments = DistillationTrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        learning_rate=0.01,
        gradient_accumulation_steps=BATCH_ROWS // processes,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        distillation_alpha=0.5,
        ddp_find_unused_parameters=False,
    )
    signal = CachedSignal(folder / "logits.h5", {})
    trainer = DistillationTrainer(tiny_student(), arguments, RowDataset(rows()), signal=signal)
    if backend == "fsdp":
        shard_on_cpu(trainer)
    trainer.train()
    kind = type(next(trainer.model.parameters())).__name__
    trainer.save_model(str(out / "model"))
    if trainer.is_world_process_zero():
        losses = [entry for entry in trainer.state.log_history if "total_loss" in entry]
        (out / "log.json").write_text(json.dumps({"losses": losses, "parameter": kind}))


def shard_on_cpu(trainer: DistillationTrainer, layer: str = "Qwen3MoeDecoderLayer") -> None:
    """accelerate shards weights on accelerators only; its sharding itself runs on CPUs as well, once its state says so."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[layer],
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    trainer.is_fsdp_enabled = True


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
