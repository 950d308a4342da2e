"""Exact training checkpoints in safetensors and JSON, and the export of a finished teacher.

What: `save_checkpoint`/`load_checkpoint` carry float32 weights, AdamW moments, the random state and
the position; `export_teacher` writes the bfloat16 folder that ships.
Why: a run of an hour must survive an interruption and then give bit-identical weights. No pickle:
a checkpoint can be opened without running code from it.
How: used by `moe_edge.demo.train`; a checkpoint is a folder, replaced as a whole by renaming.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3MoeForCausalLM

MOMENT_KEYS = ("exp_avg", "exp_avg_sq", "step")


def optimizer_tensors(model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW state as flat named tensors: `<moment>|<parameter name>`."""
    return {
        f"{key}|{name}": optimizer.state[weight][key]
        for name, weight in model.named_parameters()
        for key in MOMENT_KEYS
    }


def save_checkpoint(
    folder: Path,
    model: Qwen3MoeForCausalLM,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
) -> None:
    """Write everything beside `folder`, then swap it in, so a crash leaves a whole checkpoint."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    weights = {name: w.detach().contiguous() for name, w in model.named_parameters()}
    save_file(weights, fresh / "weights.safetensors")
    state = optimizer_tensors(model, optimizer)
    state["random_state"] = torch.get_rng_state()
    save_file(state, fresh / "optimizer.safetensors")
    (fresh / "progress.json").write_text(json.dumps(progress, indent=2), encoding="utf-8")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_progress(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint: position, settings and running totals."""
    progress: dict[str, Any] = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    return progress


def load_checkpoint(folder: Path, model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore weights, moments and random state in place; return the progress record."""
    weights = load_file(folder / "weights.safetensors")
    state = load_file(folder / "optimizer.safetensors")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])
            optimizer.state[weight] = {key: state[f"{key}|{name}"] for key in MOMENT_KEYS}
    torch.set_rng_state(state["random_state"])
    return read_progress(folder)


def add_expert_count_keys(config_path: Path) -> None:
    """Write the expert count under both names: newer and older tools read different ones."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    count = config.get("num_local_experts", config.get("num_experts"))
    config["num_experts"] = config["num_local_experts"] = count
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    config_path.write_text(text, encoding="utf-8")


def make_tokenizer_config_portable(config_path: Path) -> None:
    """Name the class that transformers 4 and 5 both know; drop how it was loaded here."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    config_path.write_text(text, encoding="utf-8")


def export_teacher(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the bfloat16 teacher; the float32 model in memory keeps its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = Qwen3MoeForCausalLM(model.config)
    shipped.load_state_dict(model.state_dict())
    shipped = shipped.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers wraps it without its types
    shipped.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    shipped.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    add_expert_count_keys(folder / "config.json")
    make_tokenizer_config_portable(folder / "tokenizer_config.json")
    for path in folder.iterdir():
        path.chmod(0o644)
