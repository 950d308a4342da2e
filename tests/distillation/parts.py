"""Shared parts of the distillation tests: a tiny teacher, its pruned student, rows and their logit cache, and a kill."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.config import DistillConfig
from moe_edge.contracts.row_split import RowSplit
from moe_edge.distillation.recovery import Recovery
from moe_edge.distillation.schedule import StageSchedule, schedule_stages
from moe_edge.distillation.trainer import DistillationTrainer
from moe_edge.formulas.divergence import teacher_topk
from moe_edge.models.loading import hashed, read_checkpoint
from moe_edge.models.pruning import prune
from moe_edge.storage.logits import LogitCacheWriter
from tests.tiny import tiny_ids, tiny_model

TEMPERATURES = (1.0, 2.0)
ROWS, TOKENS, VOCAB = 24, 16, 96
KEPT = {layer: [0, 2, 3] for layer in range(3)}


def teacher_of(folder: Path) -> Teacher:
    """What a command that has only this folder hands on."""
    return hashed(read_checkpoint(folder))


def tiny_teacher(family: str = "qwen3_moe", tied: bool = True) -> PreTrainedModel:
    return tiny_model(family, experts=4, top_k=2, layers=3, hidden=32, width=16, vocab=VOCAB, tied=tied)


def tiny_student(family: str = "qwen3_moe", tied: bool = True) -> PreTrainedModel:
    student = tiny_teacher(family, tied)
    prune(student, KEPT)
    return student


def dense_student(folder: Path, tokenizer: PreTrainedTokenizerFast, layers: int = 1) -> Path:
    """A dense checkpoint with this tokenizer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows() -> np.ndarray:
    return tiny_ids(TOKENS, ROWS, VOCAB).numpy().astype(np.int32)


def schedules(config: DistillConfig) -> list[StageSchedule]:
    """The stages of a configuration on these rows."""
    return schedule_stages(config, RowSplit(ROWS, TOKENS).train(), TOKENS)


def write_cache(
    path: Path, teacher: PreTrainedModel, ids_NS: np.ndarray, identity: dict[str, str] | None = None
) -> None:
    """The teacher's cache of the rows, k = 16."""
    with LogitCacheWriter(path, teacher.config.vocab_size, 16, TEMPERATURES, identity or {}) as writer, torch.no_grad():
        for ids_S in ids_NS:
            logits_SV = teacher(torch.from_numpy(ids_S).long()[None]).logits[0]
            writer.append(ids_S, *teacher_topk(logits_SV, 16, TEMPERATURES))


class Killed(BaseException):
    """Stands for kill -9: nothing catches it and nothing is cleaned up."""


class _KillBefore(TrainerCallback):
    def __init__(self, step: int, stage_steps: int | None) -> None:
        self._step, self._stage_steps = step, stage_steps

    def on_step_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == self._step and self._stage_steps in (None, state.max_steps):
            raise Killed


@contextmanager
def killed_before(step: int, stage_steps: int | None = None) -> Iterator[None]:
    """In here a training dies before this step (from 0) of a stage, or of the stage with so many steps."""
    plain = Recovery.trainer

    def with_kill(self: Recovery, *args: object) -> DistillationTrainer:
        trainer = plain(self, *args)  # type: ignore[arg-type]
        trainer.add_callback(_KillBefore(step, stage_steps))
        return trainer

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Recovery, "trainer", with_kill)
        yield
