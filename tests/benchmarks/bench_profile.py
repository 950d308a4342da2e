"""How much a profile pass costs beside a plain forward over the same tokens, and whether its memory grows with them.

    python tests/benchmarks/bench_profile.py [MODEL] [--tokens 16384] [--rounds 3]

The pass is the real one: observers, CKA on an eighth of the tokens (the default's share), top-k logits encoded and
written. Rounds are interleaved plain, pass, plain, ... in one process after a warm-up. Peak memory is each a fresh
process's high-water mark at two token counts. Prints one JSON line; without MODEL the demo teacher is profiled.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moe_edge.demo import demo_teacher_path
from moe_edge.metrics.memory import high_water_bytes
from moe_edge.models.loading import load_model, load_tokenizer
from moe_edge.profiling.passes import BATCH_ROWS, run_pass, share_of
from moe_edge.stages.profile import cache_logits
from moe_edge.storage.logits import LogitCacheWriter
from moe_edge.storage.rows import TokenRows
from moe_edge.texts.recipes import load_recipe
from moe_edge.texts.rows import calibration_rows

GOAL = 1.5
CKA_SHARE = 8  # one token of eight, 8192 of 65536
K, TEMPERATURES = 32, (1.0, 1.5, 2.0, 3.0, 4.0)
MIB = 2**20


def plain_forward(model: PreTrainedModel, rows: TokenRows) -> None:
    """Logits of every row, in the pass's own batches."""
    with torch.inference_mode():
        for start in range(0, len(rows.ids_NS), BATCH_ROWS):
            ids = torch.from_numpy(rows.ids_NS[start : start + BATCH_ROWS]).long()
            model(input_ids=ids, use_cache=False)


def profile_pass(model: PreTrainedModel, rows: TokenRows) -> None:
    vocab = model.config.vocab_size
    with tempfile.TemporaryDirectory(prefix="moe-edge-bench-") as folder:
        with LogitCacheWriter(Path(folder) / "logits.h5", vocab, K, TEMPERATURES, {}) as cache:
            work = share_of(rows.ids_NS, rows.n_tokens // CKA_SHARE)
            run_pass(model, work, partial=Path(folder) / "partial", identity={}, on_logits=cache_logits(cache, vocab))


def timed(
    work: Callable[[PreTrainedModel, TokenRows], None], model: PreTrainedModel, rows: TokenRows
) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work(model, rows)
    return time.perf_counter() - wall, time.process_time() - cpu


def rows_of(model: Path, tokens: int) -> TokenRows:
    return calibration_rows(load_recipe("default"), load_tokenizer(model), tokens, 512, 0)


def peak_in_a_process(model: Path, tokens: int) -> float:
    """High-water memory of a fresh process that profiles `tokens` tokens, MiB."""
    command = [sys.executable, __file__, str(model), "--tokens", str(tokens), "--peak-only"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=demo_teacher_path())
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-only", action="store_true", help="profile once and print the peak memory, MiB")
    options = parser.parse_args()
    model, rows = load_model(options.model), rows_of(options.model, options.tokens)
    if options.peak_only:
        profile_pass(model, rows)
        print((high_water_bytes() or 0) / MIB)
        return
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "pass": []}
    timed(plain_forward, model, rows_of(options.model, 2048))
    for _ in range(options.rounds):
        times["plain"].append(timed(plain_forward, model, rows))
        times["pass"].append(timed(profile_pass, model, rows))
    wall, cpu = ({name: statistics.median(pair[i] for pair in pairs) for name, pairs in times.items()} for i in (0, 1))
    counts = (max(options.tokens // 4, 2048), options.tokens)
    line = {
        "name": "profile/forward",
        "ratio": round(wall["pass"] / wall["plain"], 3),
        "goal": GOAL,
        "ratio_cpu_time": round(cpu["pass"] / cpu["plain"], 3),
        "plain_s": round(wall["plain"], 3),
        "pass_s": round(wall["pass"], 3),
        "rounds": options.rounds,
        "tokens": rows.n_tokens,
        "cka_tokens": rows.n_tokens // CKA_SHARE,
        "threads": torch.get_num_threads(),
        "peak_mib_by_tokens": {count: round(peak_in_a_process(options.model, count), 1) for count in counts},
        "model": options.model.name,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
