"""Does the harness tell llama.cpp's own speed? Decode tokens/s of our worker against a tight llama_decode loop.

Usage: python tests/benchmarks/bench_harness.py MODEL.gguf [--rounds 10] [--threads N]

The reference does what llama-bench does for tg: one token per llama_decode, wait, nothing else; no logits are copied
and no token is chosen. Both run in fresh processes on the same file, threads and shape (the same depth too),
interleaved A B, B A, ... Prints one JSON line; the goal is a ratio of the medians within 3 %.
Run it on a quiet machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from moe_edge.devices import harness
from moe_edge.devices.transport import LocalTransport
from moe_edge.process import host
from moe_edge.process.limits import available_cores
from moe_edge.runtimes.llama_cpp import repack_is_safe

GOAL = 0.03


def main() -> int:
    options = parse()
    if options.reference:
        print(json.dumps(reference_tokens_per_s(options)))
        return 0
    ours: list[float] = []
    theirs: list[float] = []
    before = host.load_facts()
    for number in range(options.rounds):
        pair = [(ours, harness_tokens_per_s), (theirs, reference_in_a_process)]
        for rates, measure in pair if number % 2 == 0 else pair[::-1]:
            rates.append(measure(options))
    ratio = statistics.median(ours) / statistics.median(theirs)
    row = {
        "benchmark": "harness decode tokens/s / llama.cpp loop",
        "ratio": round(ratio, 4),
        "goal": f"within {GOAL:.0%} of 1",
        "met": abs(ratio - 1) <= GOAL,
        "harness_tokens_per_s": summary(ours),
        "llama_cpp_tokens_per_s": summary(theirs),
        "rounds": options.rounds,
        "model": options.model.name,
        "threads": options.threads,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "machine": host.machine_facts() | before,
        "versions": host.versions(),
    }
    print(json.dumps(row))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--reference", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def summary(rates: list[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(rates), 2), "all": [round(rate, 2) for rate in rates]}


def harness_tokens_per_s(options: argparse.Namespace) -> float:
    """One fresh worker, one measured run after its warm-up: what a report would say."""
    job = harness.BenchJob(
        "llama_cpp", str(options.model), options.threads, options.prompt_tokens, options.new_tokens, repetitions=1
    )
    outcome = harness.measure(LocalTransport(), job)
    if isinstance(outcome, harness.Failure):
        raise SystemExit(str(outcome))
    return float(harness.to_speed(outcome, options.prompt_tokens).decode_tokens_per_s or 0)


def reference_in_a_process(options: argparse.Namespace) -> float:
    """The tight loop in its own process."""
    arguments = [str(options.model), "--reference"]
    for name in ("threads", "prompt_tokens", "new_tokens"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, check=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def reference_tokens_per_s(options: argparse.Namespace) -> float:
    """A full-shape warm-up, then new_tokens - 1 timed single-token decodes behind the prompt."""
    from llama_cpp import llama_cpp as lib

    lib.llama_backend_init()
    loading = lib.llama_model_default_params()
    loading.use_extra_bufts = repack_is_safe()
    model = lib.llama_model_load_from_file(str(options.model).encode(), loading)
    params = lib.llama_context_default_params()
    params.n_ctx = options.prompt_tokens + options.new_tokens + 8
    params.n_threads = params.n_threads_batch = options.threads
    context = lib.llama_init_from_model(model, params)
    decode_all(lib, context, options)
    return decode_all(lib, context, options)


def decode_all(lib: Any, context: Any, options: argparse.Namespace) -> float:
    """Prompt untimed, then the timed loop; tokens per second."""
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    prompt = (lib.llama_token * options.prompt_tokens)(*range(3, 3 + options.prompt_tokens))
    check(lib.llama_decode(context, lib.llama_batch_get_one(prompt, len(prompt))))
    lib.llama_synchronize(context)
    token = (lib.llama_token * 1)(7)
    steps = options.new_tokens - 1
    started = time.perf_counter()
    for step in range(steps):
        token[0] = 7 + step
        check(lib.llama_decode(context, lib.llama_batch_get_one(token, 1)))
        lib.llama_synchronize(context)
    return steps / (time.perf_counter() - started)


def check(status: int) -> None:
    if status != 0:
        raise SystemExit(f"llama_decode failed with status {status}")


if __name__ == "__main__":
    sys.exit(main())
