"""Shared parts of the distillation tests: a tiny teacher, its pruned student, rows and their logit cache."""

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from moe_edge.formulas.divergence import teacher_topk
from moe_edge.models.pruning import prune
from moe_edge.storage.logits import LogitCacheWriter
from tests.tiny import tiny_ids, tiny_model

TEMPERATURES = (1.0, 2.0)
ROWS, TOKENS, VOCAB = 24, 16, 96


def tiny_teacher(family: str = "qwen3_moe", tied: bool = True) -> PreTrainedModel:
    return tiny_model(family, experts=4, top_k=2, layers=3, hidden=32, width=16, vocab=VOCAB, tied=tied)


def tiny_student(family: str = "qwen3_moe", tied: bool = True) -> PreTrainedModel:
    student = tiny_teacher(family, tied)
    prune(student, {layer: [0, 2, 3] for layer in range(3)})
    return student


def rows() -> np.ndarray:
    return tiny_ids(TOKENS, ROWS, VOCAB).numpy().astype(np.int32)


def write_cache(
    path: Path, teacher: PreTrainedModel, ids_NS: np.ndarray, identity: dict[str, str] | None = None
) -> None:
    """The teacher's cache of the rows, k = 16."""
    with LogitCacheWriter(path, teacher.config.vocab_size, 16, TEMPERATURES, identity or {}) as writer, torch.no_grad():
        for ids_S in ids_NS:
            logits_SV = teacher(torch.from_numpy(ids_S).long()[None]).logits[0]
            writer.append(ids_S, *teacher_topk(logits_SV, 16, TEMPERATURES))
