"""The process that runs one artifact: `python -m moe_edge.devices.worker`, a job as JSON in, raw samples as JSON out.

One fresh process per artifact, so that memory is the artifact's own. It opens the runtime, does one full-shape warm-up,
then the measured runs; it returns timestamps and never averages. Memory is sampled during loading and warm-up only, and
the kernel's high-water mark covers the rest, so that no sampler disturbs a timed run.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

from moe_edge.contracts.errors import MoeEdgeError, ResourceProblem
from moe_edge.metrics.memory import PeakRss, high_water_bytes, tree_rss_bytes

REJECTED = 3  # the exit status of a job that the runtime refused with a message for the user
TOO_LARGE = 4  # of one that does not fit into memory
CONTEXT_MARGIN_TOKENS = 8
Opener = Callable[..., Any]


def main(opener: Opener | None = None) -> int:
    """Read a job from stdin, run it, write samples to stdout; `opener` replaces the real runtimes in tests."""
    # Native libraries print to descriptor 1: keep the real stdout aside, and send theirs to stderr.
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.load(sys.stdin)
    try:
        samples = measure(job, opener or _open)
    except MoeEdgeError as error:
        print(error, file=sys.stderr)
        return TOO_LARGE if isinstance(error, ResourceProblem) else REJECTED
    with result:
        json.dump(samples, result)
    return 0


def _open(kind: str, path: str, threads: int, context_length: int, **options: str) -> Any:
    from pathlib import Path

    from moe_edge.runtimes import open_runtime

    return open_runtime(kind, Path(path), threads, context_length, **options)


def measure(job: dict[str, Any], opener: Opener) -> dict[str, Any]:
    """Load, warm up and measure.

    Args:
        job: runtime, path, threads, prompt_tokens, new_tokens, repetitions, prompt_ids (null: seeded random ids),
            options of the runtime (none where absent).
        opener: opens a runtime from (kind, path, threads, context_length, **options).

    Returns:
        Raw samples: runs of monotonic timestamps in ns, memory in bytes.
    """
    context_length = job["prompt_tokens"] + job["new_tokens"] + CONTEXT_MARGIN_TOKENS
    parent = os.getppid()
    baseline_bytes = tree_rss_bytes(psutil.Process())
    started_ns = time.perf_counter_ns()
    with PeakRss(uss=True) as peak:
        runtime = opener(job["runtime"], job["path"], job["threads"], context_length, **job.get("options", {}))
        load_ns = time.perf_counter_ns() - started_ns
        prompt_S = _prompt(job, runtime.vocab)
        one_run(runtime, prompt_S, job["new_tokens"])
    runs = []
    gc.collect()
    gc.disable()
    for _ in range(job["repetitions"]):
        if os.getppid() != parent:
            raise SystemExit("the process that asked for this measurement is gone")
        runs.append(one_run(runtime, prompt_S, job["new_tokens"]))
    gc.enable()
    runtime.close()
    return {
        "schema": "moe-edge/samples@1",
        "runs": runs,
        "load_ns": load_ns,
        "baseline_rss_bytes": baseline_bytes,
        "peak_rss_bytes": max(peak.peak_bytes, high_water_bytes() or 0),
        "peak_uss_bytes": peak.peak_uss_bytes,
        "repacks": getattr(runtime, "repacks", None),  # of llama.cpp alone
    }


def _prompt(job: dict[str, Any], vocab: int) -> np.ndarray:
    ids = job["prompt_ids"]
    if ids is None:
        ids = np.random.default_rng(0).integers(vocab, size=job["prompt_tokens"])
    return np.asarray(ids, dtype=np.int64)


def one_run(runtime: Any, prompt_S: np.ndarray, new_tokens: int) -> dict[str, Any]:
    """Prefill the prompt and decode greedily; a timestamp when each token is known."""
    clock = time.perf_counter_ns
    issued_ns = clock()
    logits_V = runtime.prefill(prompt_S)
    prefilled_ns = clock()
    token = int(logits_V.argmax())
    token_ns = [clock()]
    for _ in range(new_tokens - 1):
        token = int(runtime.step(token).argmax())
        token_ns.append(clock())
    return {"issued_ns": issued_ns, "prefilled_ns": prefilled_ns, "token_ns": token_ns}


if __name__ == "__main__":
    sys.exit(main())
