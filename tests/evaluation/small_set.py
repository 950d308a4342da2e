"""A tiny instruction set, and a student that says nothing to it."""

import json
from pathlib import Path

import torch

from moe_edge.models.loading import load_model
from tests.tiny import tiny_checkpoint

EOS = 2
ROWS = [
    {"category": "facts", "instruction": "Name the capital of France.", "input": "", "output": "Paris"},
    {"category": "facts", "instruction": "How many legs has a spider?", "output": ["eight", "8 legs"]},
    {"category": "style", "instruction": "Shorten.", "input": "It is raining cats and dogs.", "output": "It pours."},
    {"category": "style", "instruction": "Say something.", "output": ""},
]


def write_set(folder: Path) -> Path:
    """ROWS as a file, whose set is called 'tiny set/test'."""
    path = folder / "tiny set" / "test.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def silent_student(folder: Path) -> Path:
    """A random student whose first token is always the end: a large constant in every embedding points the head at it."""
    checkpoint = tiny_checkpoint(folder, "qwen3_moe", name="untrained")
    model = load_model(checkpoint)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 50.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[EOS, 0] = 50.0
    model.save_pretrained(checkpoint)
    return checkpoint
