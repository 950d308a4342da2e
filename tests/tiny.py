"""Tiny random models of every supported family, for tests: milliseconds to build, with meaningful routing.

Norms, biases and routers are perturbed, so that a test which mixes up two of them fails; weights have the
scale of a trained model (about one over the square root of their inputs), so that every expert matters.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from moe_edge.demo.tokenizer import build_tokenizer
from moe_edge.families import FAMILIES
from moe_edge.models.loading import student_config
from tests.families.tiny_configs import HEADS, KV_HEADS, TINY, Sizes

FAMILY_NAMES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe")
ALL_FAMILIES = tuple(FAMILIES)  # some need three layers or more to show all they have
TOKENIZER_SIZE = 320
TEXTS = (
    "The quick brown fox jumps over the lazy dog while the experts are routed to their tokens.",
    "A mixture of experts sends every token to a few experts and adds up what they answer.",
    "import numpy as np\nfor index in range(10):\n    print(index, np.sqrt(index))\n",
    "Der schnelle braune Fuchs springt; 1234567890 Äpfel, größer als 42 €.",
)

# What differs between the families; sizes come from the arguments of `tiny_model`.
_FAMILY_CONFIG: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 32, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "qwen2_moe": {"norm_topk_prob": False, "decoder_sparse_step": 1, "qkv_bias": True},
    "mixtral": {},
    "olmoe": {"norm_topk_prob": False, "clip_qkv": 4.0},
}
_EXPERTS_KEY = {
    "qwen3_moe": "num_experts",
    "qwen2_moe": "num_experts",
    "mixtral": "num_local_experts",
    "olmoe": "num_experts",
}


def tiny_config(
    family: str, experts: int, top_k: int, layers: int, hidden: int, width: int, vocab: int, tied: bool
) -> dict[str, Any]:
    """Keyword arguments of the family's config class."""
    values = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "initializer_range": hidden**-0.5,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family in TINY:
        return values | TINY[family](Sizes(experts, top_k, layers, hidden, width))
    values |= {_EXPERTS_KEY[family]: experts, "num_experts_per_tok": top_k}
    widths = {"moe_intermediate_size": width, "intermediate_size": 2 * width}
    if family in ("mixtral", "olmoe"):
        widths = {"intermediate_size": width}
    if family == "qwen2_moe":
        widths["shared_expert_intermediate_size"] = width + 16
    return values | widths | _FAMILY_CONFIG[family]


def tiny_model(
    family: str,
    *,
    experts: int = 6,
    top_k: int = 2,
    layers: int = 2,
    hidden: int = 64,
    width: int = 32,
    vocab: int = 256,
    tied: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A random causal language model of `family` in float32 and eval mode; `overrides` are config keys."""
    values = tiny_config(family, experts, top_k, layers, hidden, width, vocab, tied) | overrides
    config = AutoConfig.for_model({"qwen3_5_moe": "qwen3_5_moe_text"}.get(family, family), **values)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _perturb(model)
    return model.eval()


@torch.no_grad()
def _perturb(model: nn.Module) -> None:
    """Norm gains around 1, biases around 0, and routers whose logits have a spread of about 1.5."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif name.endswith((".bias", "_proj_bias")):
            parameter.add_(0.2 * torch.randn_like(parameter))
        elif name.endswith("e_score_correction_bias"):  # beside probabilities of about 1 / E
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif name.endswith((".gate.weight", ".router.weight", ".wg.weight", ".shared_expert_gate.weight")):
            parameter.copy_(1.5 * parameter.shape[1] ** -0.5 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("_bias"):  # beside sigmoids
            buffer.add_(0.2 * torch.randn_like(buffer))


def tiny_tokenizer(size: int = TOKENIZER_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE (GPT-2 splitting) with a ChatML template; ids 0..2 are its special tokens."""
    return build_tokenizer(TEXTS, size, 256)


def tiny_checkpoint(
    tmp_path: Path,
    family: str,
    with_tokenizer: bool = True,
    *,
    name: str | None = None,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Path:
    """Save a tiny model (and tokenizer) under `tmp_path / name`; the expert count is in config.json under all the family's keys.

    The vocabulary defaults to the tokenizer's when there is one; `kwargs` go to `tiny_model`.
    """
    folder = tmp_path / (name or f"tiny-{family}")
    if with_tokenizer:
        tokenizer = tiny_tokenizer()
        kwargs.setdefault("vocab", len(tokenizer))
        tokenizer.save_pretrained(folder)
    model = tiny_model(family, **kwargs).to(dtype)
    model.save_pretrained(folder)
    config_path = folder / "config.json"
    config = student_config(json.loads(config_path.read_text()))
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def tiny_ids(tokens: int = 24, rows: int = 2, vocab: int = 256, seed: int = 0) -> torch.Tensor:
    """Random token ids of shape (rows, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (rows, tokens), generator=generator)
