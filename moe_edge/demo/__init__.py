"""The demo teacher: a small Qwen3-MoE chat model that ships inside the package.

What: `demo_teacher_path()` gives the folder of a real, trained-from-scratch mixture-of-experts
model of at most 32,000,000 bytes with its own tokenizer.
Why: quickstart, tests and examples then need no download and run on two CPU cores.
How: `from moe_edge.demo import demo_teacher_path`; load the folder with `AutoModelForCausalLM`.
To train it again see `moe_edge/demo/train.py`.
"""

from pathlib import Path


def demo_teacher_path() -> Path:
    """The folder of the shipped demo teacher (`config.json`, `model.safetensors`, tokenizer)."""
    return Path(__file__).resolve().parent / "teacher"


__all__ = ["demo_teacher_path"]
