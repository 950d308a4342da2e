"""Our experts kernels beside the stock ones of transformers: one training pass (forward and backward), same tokens.

    python -m tests.benchmarks.bench_kernels [MODEL] [--keep 10] [--tokens 1024] [--rounds 3]

Rounds are interleaved kernel after kernel in one process, after a warm-up of each. `--keep` prunes every layer to its
first experts, as a student has them. Prints one JSON line with the median ratio of each kernel's time to that of
`eager`; `chosen` is what `fastest_kernel` takes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from moe_edge.demo import demo_teacher_path
from moe_edge.models.kernels import ALL_AT_ONCE, SORTED_LOOP, fastest_kernel
from moe_edge.models.loading import load_model
from moe_edge.models.pruning import prune
from moe_edge.models.taps import body
from moe_edge.models.views import moe_layers

KERNELS = ("eager", "grouped_mm", SORTED_LOOP, ALL_AT_ONCE)


def training_pass(model: torch.nn.Module, ids_BS: torch.Tensor) -> float:
    """Seconds of one forward and backward of the body."""
    started = time.perf_counter()
    body(model)(input_ids=ids_BS, use_cache=False).last_hidden_state.square().mean().backward()
    seconds = time.perf_counter() - started
    model.zero_grad()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=demo_teacher_path())
    parser.add_argument("--keep", type=int)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = load_model(options.model)
    if options.keep:
        prune(model, {view.index: list(range(options.keep)) for view in moe_layers(model)})
    view = moe_layers(model)[0]
    ids_BS = torch.randint(0, model.config.vocab_size, (options.tokens // 512, 512), generator=torch.manual_seed(0))
    seconds: dict[str, list[float]] = {kernel: [] for kernel in KERNELS}
    for round_number in range(options.rounds + 1):
        for kernel in KERNELS:
            model.set_experts_implementation(kernel)
            taken = training_pass(model, ids_BS)
            if round_number:  # the first is the warm-up
                seconds[kernel].append(taken)
    stock = statistics.median(seconds["eager"])
    result = {
        "benchmark": "experts_kernels",
        "model": options.model.name,
        "experts": view.count,
        "top_k": view.top_k,
        "tokens": ids_BS.numel(),
        "seconds_eager": round(stock, 3),
        "time_over_eager": {name: round(statistics.median(taken) / stock, 3) for name, taken in seconds.items()},
        "chosen": fastest_kernel(view.top_k, view.count),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
