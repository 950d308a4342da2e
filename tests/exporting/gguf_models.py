"""Tiny checkpoints that llama.cpp's architectures can represent, and their reference logits."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_edge.models.students import load_student
from tests.tiny import tiny_checkpoint, tiny_tokenizer

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
    "original_max_position_embeddings": 64,
}
# Trained on 32 positions and stretched to 256: of 8 frequencies one is kept, two are blended, five divided by 8.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
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


def llama_checkpoint(tmp_path: Path, name: str = "llama", **overrides: Any) -> Path:
    """A folder with a Llama of the tiny models' shape, which no mixture becomes but users bring."""
    tokenizer = tiny_tokenizer()
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | overrides
    config = AutoConfig.for_model("llama", **({"initializer_range": values["hidden_size"] ** -0.5} | values))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokenizer.save_pretrained(tmp_path / name)
    model.save_pretrained(tmp_path / name)
    return tmp_path / name


@torch.no_grad()
def reference_logits(checkpoint: Path, ids_S: np.ndarray) -> np.ndarray:
    model = load_student(checkpoint)
    return model(torch.as_tensor(ids_S)[None]).logits[0].float().numpy()


def some_ids(tokens: int = 48, vocab: int = 300, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, tokens)
