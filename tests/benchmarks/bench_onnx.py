"""ONNX CPU decode: int4 with accuracy_level 4, the same graph without, and the GGUF with Q4_K experts, as JSON lines.

One model, by default a synthetic Qwen3-MoE (hidden 1024, 32 experts of width 512, top-4, 4 layers, random weights), is exported
to all of them. Decoding alternates between them in one process, after a round that warms up; ratios are of medians (goal: level
0 / level 4 >= 2). Bytes, quantization time and float32 parity follow.

    python -m tests.benchmarks.bench_onnx [MODEL] [--threads 1] [--tokens 32] [--repetitions 5] [--hidden 1024] ...
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_edge.exporting.gguf import write_gguf
from moe_edge.exporting.gguf_quantize import quantize_gguf
from moe_edge.exporting.onnx import export_onnx
from moe_edge.exporting.onnx_quantize import quantize
from moe_edge.runtimes import open_runtime
from moe_edge.runtimes.base import Runtime
from tests.tiny import tiny_checkpoint

CONTEXT, PROMPT_TOKENS, FIRST_TOKEN = 256, 32, 3
EXPERTS_Q4_K = {"expert_gate_up": "Q4_K", "expert_down": "Q4_K"}  # four bits where the ONNX file has them
QUANTIZED_WEIGHTS = 1 << 22


def decode_ms(runtime: Runtime, prompt_S: np.ndarray, tokens: int) -> float:
    """Milliseconds per decoded token after reading the prompt."""
    runtime.prefill(prompt_S)
    started = time.perf_counter()
    for token in range(FIRST_TOKEN, FIRST_TOKEN + tokens):
        runtime.step(token)
    return (time.perf_counter() - started) / tokens * 1e3


def export_all(checkpoint: Path, work: Path, threads: int) -> dict[str, tuple[str, Path]]:
    """Name -> (runtime, artifact)."""
    files = {f"onnx_int4_level_{level}": ("ort", work / f"level-{level}") for level in (4, 0)}
    for level, (_, folder) in zip((4, 0), files.values(), strict=True):
        export_onnx(checkpoint, folder, precision="int4", scheme="rtn", accuracy_level=level)
    write_gguf(checkpoint, work / "F16.gguf", name="bench")
    quantize_gguf(work / "F16.gguf", work / "Q4_K.gguf", "Q4_K_M", None, threads, EXPERTS_Q4_K)
    return files | {"gguf_q4_k": ("llama_cpp", work / "Q4_K.gguf")}


def measured(files: dict[str, tuple[str, Path]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds per token of every artifact, interleaved; the first round is left out."""
    prompt_S = torch.randint(FIRST_TOKEN, 300, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(0)).numpy()
    opened = {
        name: open_runtime(kind, path, threads=options.threads, context_length=CONTEXT)
        for name, (kind, path) in files.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in files}
    for repetition in range(options.repetitions + 1):
        for name, runtime in opened.items():
            sample = decode_ms(runtime, prompt_S, options.tokens)
            if repetition:
                samples[name].append(round(sample, 4))
    return samples


def parity(checkpoint: Path, work: Path, threads: int) -> float:
    """Largest difference between a logit of the float32 graph and of transformers."""
    export_onnx(checkpoint, work / "fp32", precision="fp32")
    ids_S = np.arange(FIRST_TOKEN, FIRST_TOKEN + PROMPT_TOKENS)
    logits = []
    for kind, path in (("hf", checkpoint), ("ort", work / "fp32")):
        with open_runtime(kind, path, threads=threads, context_length=CONTEXT) as runtime:
            logits.append(runtime.logits(ids_S))
    return float(np.abs(logits[0] - logits[1]).max())


def seconds_per_100m(bits: int) -> float:
    """Of our quantizer with an importance matrix, block 32, on the threads that torch has."""
    generator = torch.Generator().manual_seed(0)
    weight_RC, importance = torch.randn(2048, 2048, generator=generator), torch.rand(1, 2048, generator=generator)
    started = time.perf_counter()
    quantize(weight_RC, bits, 32, importance)
    return (time.perf_counter() - started) * 1e8 / QUANTIZED_WEIGHTS


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("model.onnx*"))


def show(name: str, **values: Any) -> None:
    print(json.dumps({"name": name, **values}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    for name, default in {"threads": 1, "tokens": 32, "repetitions": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = {"experts": 32, "top_k": 4, "layers": 4, "hidden": 1024, "width": 512}  # of the synthetic model
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint = options.model or tiny_checkpoint(
            work, "qwen3_moe", dtype=torch.bfloat16, num_attention_heads=16, num_key_value_heads=4, head_dim=64,
            **{name: getattr(options, name) for name in sizes},
        )  # fmt: skip
        files = export_all(checkpoint, work, options.threads)
        samples = measured(files, options)
        medians = {name: statistics.median(values) for name, values in samples.items()}
        for name, (_, path) in files.items():
            show(f"{name}_decode_ms_per_token", median=medians[name], samples=samples[name], threads=options.threads)
            show(f"{name}_bytes", bytes=size_of(path))
        fast = medians["onnx_int4_level_4"]
        show("onnx_level_0_over_level_4", ratio=medians["onnx_int4_level_0"] / fast, goal=2.0)
        show("gguf_q4_k_over_onnx_level_4", ratio=medians["gguf_q4_k"] / fast)
        for bits in (4, 8):
            show(f"onnx_quantizer_{bits}_bit_seconds_per_100m_weights", seconds=seconds_per_100m(bits))
        show("onnx_fp32_max_abs_logit_difference", value=parity(checkpoint, work, options.threads), goal=1e-4)


if __name__ == "__main__":
    main()
