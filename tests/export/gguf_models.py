"""Tiny checkpoints that llama.cpp's architectures can represent, and their reference logits."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_edge.families.loading import load_model
from tests.tiny import tiny_checkpoint

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# llama.cpp's olmoe ignores clip_qkv and needs one key-value head per head; its gpt-oss clamps at 7 and rounds yarn's range
REPRESENTABLE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "qwen2_moe": {},
    "mixtral": {},
    "olmoe": {"clip_qkv": None, "num_key_value_heads": 4},
    "granitemoe": {},
    "granitemoeshared": {},
    "ernie4_5_moe": {},
    "gpt_oss": {"swiglu_limit": 7.0, "rope_parameters": YARN},
    "deepseek_v2": {"topk_method": "greedy"},
    "deepseek_v3": {},
    "glm4_moe_lite": {},
    "glm4_moe": {},
    "lfm2_moe": {"routed_scaling_factor": 1.0},
    "minimax_m2": {},
    "hunyuan_v1_moe": {},
    "qwen3_5_moe": {"linear_key_head_dim": 16, "linear_value_head_dim": 16},
}


def representable(tmp_path: Path, family: str, **kwargs: Any) -> Path:
    return tiny_checkpoint(tmp_path, family, **(REPRESENTABLE[family] | kwargs))


@torch.no_grad()
def reference_logits(checkpoint: Path, ids_S: np.ndarray) -> np.ndarray:
    model = load_model(checkpoint)
    return model(torch.as_tensor(ids_S)[None]).logits[0].float().numpy()


def some_ids(tokens: int = 48, vocab: int = 300, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, tokens)
