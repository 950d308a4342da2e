"""GGUF export: wall time per step, and private memory above the post-import baseline against its limit.

    python tests/benchmarks/bench_gguf.py [CHECKPOINT] [--recipe Q4_K_M] [--experts 32 --hidden 512 --width 512]

Without a checkpoint a random Qwen3-MoE is made. One JSON line per step (f16, quantize). The limit: USS above the baseline
<= 2 x the largest tensor in float32 + 300 MiB. The export runs in this process, a thread samples its USS.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

import psutil

from moe_edge.exporting.gguf import write_gguf
from moe_edge.exporting.gguf_quantize import quantize_gguf
from moe_edge.runtimes.gguf_header import check_gguf_header
from tests.tiny import tiny_checkpoint

MIB = 1 << 20
FIXED_ALLOWANCE_MIB = 300
SAMPLE_INTERVAL_S = 0.01


def main() -> None:
    options = _arguments()
    with tempfile.TemporaryDirectory(prefix="moe-edge-gguf-") as scratch:
        folder = Path(scratch)
        checkpoint = options.checkpoint or _made_elsewhere(folder, options)
        f16, quantized = folder / "f16.gguf", folder / "quantized.gguf"
        measure("f16", lambda: write_gguf(checkpoint, f16, name="bench"), f16)
        measure(
            options.recipe, lambda: quantize_gguf(f16, quantized, options.recipe, None, options.threads), f16, quantized
        )


def measure(step: str, work: Callable[[], object], f16: Path, out: Path | None = None) -> None:
    """Run one step and print its line; the baseline is the process before the step."""
    process, stop = psutil.Process(), threading.Event()
    baseline = peak = process.memory_full_info().uss

    def sample() -> None:
        nonlocal peak
        while not stop.wait(SAMPLE_INTERVAL_S):
            peak = max(peak, process.memory_full_info().uss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    started = time.perf_counter()
    try:
        work()
    finally:
        seconds = time.perf_counter() - started
        stop.set()
        sampler.join()
    largest_bytes = max(prod(tensor.shape) for tensor in check_gguf_header(f16).tensors.values()) * 4
    limit_mib = 2 * largest_bytes / MIB + FIXED_ALLOWANCE_MIB
    grown_mib = (peak - baseline) / MIB
    line = {
        "benchmark": "gguf_export",
        "step": step,
        "seconds": round(seconds, 2),
        "bytes": (out or f16).stat().st_size,
        "uss_above_baseline_mib": round(grown_mib, 1),
        "largest_tensor_fp32_mib": round(largest_bytes / MIB, 1),
        "limit_mib": round(limit_mib, 1),
        "ratio": round(grown_mib / limit_mib, 3),
        "met": grown_mib <= limit_mib,
    }
    print(json.dumps(line), flush=True)


def _made_elsewhere(folder: Path, options: argparse.Namespace) -> Path:
    """A random checkpoint, made by a child process so that building it does not raise this one's baseline."""
    child = os.fork()
    if child == 0:
        sizes = {"experts": options.experts, "hidden": options.hidden, "width": options.width, "layers": 1}
        tiny_checkpoint(folder, "qwen3_moe", name="teacher", vocab=4096, **sizes)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("the random checkpoint could not be made")
    return folder / "teacher"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="checkpoint folder; default: a random Qwen3-MoE")
    parser.add_argument("--recipe", default="Q4_K_M")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    return parser.parse_args()


if __name__ == "__main__":
    main()
