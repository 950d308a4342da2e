"""FSDP on CPUs, where accelerate does not shard by itself: what the tests of several processes do by hand."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from moe_edge.distillation.trainer import DistillationTrainer


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
