"""ONNX CPU decode: accuracy_level 4 against the same graph without, and float32 parity, as JSON lines.

A synthetic Qwen3-MoE (hidden 1024, 32 experts of width 512, top-4, 4 layers, random weights) is exported three times.
Decoding alternates between the two int4 graphs in one process; the ratio of the medians is the result (goal: >= 2).

    python -m tests.benchmarks.bench_onnx [--threads 1] [--tokens 32] [--repetitions 5]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from moe_edge.export.onnx import export_onnx
from moe_edge.runtimes.hf import HfRuntime
from moe_edge.runtimes.ort import OrtRuntime
from tests.tiny import tiny_checkpoint

CONTEXT = 256
SIZES = {"experts": 32, "top_k": 4, "layers": 4, "hidden": 1024, "width": 512}
OVERRIDES = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}


def decode_ms(runtime: OrtRuntime, prompt_S: np.ndarray, tokens: int) -> float:
    """Milliseconds per decoded token after reading the prompt."""
    runtime.prefill(prompt_S)
    started = time.perf_counter()
    for token in range(3, 3 + tokens):
        runtime.step(token)
    return (time.perf_counter() - started) / tokens * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prompt = torch.randint(3, 300, (32,), generator=torch.Generator().manual_seed(0)).numpy()
    with tempfile.TemporaryDirectory() as work:
        checkpoint = tiny_checkpoint(Path(work), "qwen3_moe", dtype=torch.bfloat16, **SIZES, **OVERRIDES)
        folders = {level: Path(work) / f"level-{level}" for level in (4, 0)}
        for level, folder in folders.items():
            export_onnx(checkpoint, folder, precision="int4", scheme="rtn", accuracy_level=level)
        runtimes = {level: OrtRuntime(folder, arguments.threads, CONTEXT) for level, folder in folders.items()}
        samples: dict[int, list[float]] = {level: [] for level in runtimes}
        for repetition in range(arguments.repetitions + 1):
            for level, runtime in runtimes.items():
                sample = decode_ms(runtime, prompt, arguments.tokens)
                if repetition:  # the first round warms up
                    samples[level].append(sample)
        medians = {level: statistics.median(values) for level, values in samples.items()}
        row = {"name": "onnx_decode_ratio", "ratio": medians[0] / medians[4], "goal": 2.0, "threads": arguments.threads}
        print(json.dumps(row | {f"level_{level}_ms_per_token": samples[level] for level in samples}), flush=True)

        export_onnx(checkpoint, Path(work) / "fp32", precision="fp32")
        with HfRuntime(checkpoint, arguments.threads, CONTEXT) as hf:
            expected = hf.logits(prompt)
        with OrtRuntime(Path(work) / "fp32", arguments.threads, CONTEXT) as ort:
            difference = float(np.abs(ort.logits(prompt) - expected).max())
        print(json.dumps({"name": "onnx_fp32_parity", "max_abs_difference": difference, "goal": 1e-4}), flush=True)


if __name__ == "__main__":
    main()
