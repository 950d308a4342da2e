"""The budget solver on real headers: Qwen3-30B-A3B against every shipped target, as a Markdown table.

    python tests/benchmarks/bench_solver.py [CHECKPOINT]

The checkpoint is made from the public numbers (48 layers, 128 experts, top-8, hidden 2048, expert width 768, 32 heads, 4
key-value heads of 128, vocabulary 151936, untied head), headers only. Sizes are predictions in 1e9 bytes, speeds are the
roofline of each target (+-25 %); nothing is run. The choice is what `moe-edge plan` shows: where an absolute budget leaves
bits free, by prior KLs, which a profile replaces by measured ones.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.config_io import resolve_config
from moe_edge.contracts.errors import InfeasibleError
from moe_edge.contracts.targets_io import list_targets, read_target
from moe_edge.planning.allocation import BudgetAnswer, header_plan
from moe_edge.planning.decision import decide_by_priors
from moe_edge.planning.options import largest_contexts
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.qwen3_30b import write_headers_only

HEADER = "| target | experts | top-k | bits | file GB | peak GB | KV cache | largest context | tokens/s | feasible, or why not |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="a checkpoint folder; without it Qwen3-30B-A3B's headers"
    )
    parser.add_argument("--formats", default="[gguf]", help="export.formats")
    parser.add_argument("--set", action="append", default=[], help="a further setting, such as plan.top_k=auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moe-edge-solver-") as scratch:
        headers = inspect_checkpoint(options.checkpoint or write_headers_only(Path(scratch)))
        print(f"{headers.total_bytes / 1e9:.1f} GB of weights, {len(headers.tensors)} tensors\n\n{HEADER}")
        print("|---|---:|---:|---|---:|---:|---|---|---:|---|")
        started = time.perf_counter()
        for target in list_targets():
            print(row(headers, target, [f"export.formats={options.formats}", *options.set]))
        print(f"\n{len(list_targets())} targets in {time.perf_counter() - started:.1f} s")


def row(headers: CheckpointHeaders, target: str, settings: Sequence[str]) -> str:
    """One line of the table."""
    config = resolve_config(read_target(target), settings=list(settings))
    try:
        return feasible_row(target, decide_by_priors(header_plan(headers, config), config))
    except InfeasibleError as error:
        nearest = " ".join(" ".join(line.split()) for line in (error.why or "").splitlines()[2:3])
        return (
            f"| {target} | - | - | - | - | - | - | - | - | no: {error.what}; nearest: {nearest}; {error.next_command} |"
        )


def feasible_row(target: str, found: BudgetAnswer) -> str:
    """What was chosen, and what it was up against."""
    choice, expected = found.choice, found.choice.estimate
    speed = "unknown" if expected.decode_tokens_per_s is None else f"{expected.decode_tokens_per_s:.0f}"
    doubts = [note.split(":")[0].lower() for note in found.notes if note.startswith("Unsafe")]
    contexts = ", ".join(f"{tokens} in {name}" for name, tokens in largest_contexts(found.space, choice).items())
    rival = f"; against {found.competitor}" if found.competitor else ""
    return (
        f"| {target} | {choice.experts} of {found.model.spec.moe.experts} | {choice.shape.top_k} | {choice.packing.label} "
        f"| {expected.file_bytes / 1e9:.1f} | {expected.peak_memory_bytes / 1e9:.1f} "
        f"| {expected.kv_precision}, {expected.context_length} tokens | {contexts} | {speed} "
        f"| {', '.join(['yes', *doubts])}{rival} |"
    )


if __name__ == "__main__":
    main()
