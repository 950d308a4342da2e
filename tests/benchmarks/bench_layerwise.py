"""A teacher larger than the memory it is given: a synthetic Qwen3-MoE is profiled layer by layer and compressed.

    python tests/benchmarks/bench_layerwise.py [--gigabytes 8] [--layers 12] [--tokens 8192] [--dtype auto] [--keep DIR]

Writes a checkpoint of random bfloat16 weights (tensor by tensor, so that writing needs little memory), then runs the
stages `profile` (layerwise) and `compress` as the command line does, each in a process of its own, and takes the peak
of its resident memory from the operating system. Prints one JSON line; `ratio` is the peak of the profile over the
design's goal, 2.5 times the largest layer plus the embedding, all as stored in bfloat16 (the computation is in float32).
Disk: about twice the checkpoint.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from math import prod
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig

from moe_edge.demo.tokenizer import build_tokenizer
from moe_edge.families import family_of
from moe_edge.families.names import expected_entries, source_shape
from moe_edge.models.streaming import StreamedModel
from moe_edge.storage.files import write_json_atomic
from moe_edge.storage.tensor_files import PlannedTensor, write_tensors
from moe_edge.texts.recipes import load_recipe

LIMIT_GIB, FACTOR = 3.0, 2.5
VOCABULARY, HEAD_DIM, TOP_K = 4096, 128, 8
PIECE = 1 << 22  # random numbers at once
MIB, GIB = 2**20, 2**30


def config_for(gigabytes: float, layers: int) -> Qwen3MoeConfig:
    """A model of at least `gigabytes` (10^9) in bfloat16; the experts take up nearly all of it."""
    hidden = 2048 if gigabytes >= 2 else 512
    width, heads, kv_heads = hidden * 3 // 8, hidden // HEAD_DIM, max(1, hidden // HEAD_DIM // 4)
    attention = 2 * hidden * HEAD_DIM * (heads + kv_heads)
    per_layer = gigabytes * 1e9 / 2 / layers - attention
    experts = max(16, 8 * -(-int(per_layer / (3 * hidden * width)) // 8))
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=HEAD_DIM, num_experts=experts, num_experts_per_tok=TOP_K,
        moe_intermediate_size=width, intermediate_size=4 * hidden, norm_topk_prob=True, max_position_embeddings=4096,
        tie_word_embeddings=False, architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def write_teacher(folder: Path, config: Qwen3MoeConfig) -> int:
    """The checkpoint folder; returns the bytes of its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    values = config.to_dict() | {"num_experts": config.num_experts, "num_local_experts": config.num_experts}
    family = family_of(values)
    entries = expected_entries(family, family.spec(values))
    tensors = [PlannedTensor(name, "BF16", source_shape(entry)) for entry in entries for name in entry.sources]
    write_tensors(folder, tensors, _numbers)
    write_json_atomic(folder / "config.json", values)
    texts = [path.read_text(encoding="utf-8") for path in load_recipe("default").files()]
    build_tokenizer(texts, VOCABULARY, 4096).save_pretrained(folder)
    return sum(tensor.bytes for tensor in tensors)


def _numbers(tensor: PlannedTensor) -> Iterator[Tensor]:
    """Gains of one, and matrices that keep the size of what they multiply."""
    generator = torch.Generator().manual_seed(crc32(tensor.name.encode()))
    left, scale = prod(tensor.shape), tensor.shape[-1] ** -0.5
    while left:
        count = min(left, PIECE)
        if len(tensor.shape) == 1:
            yield torch.ones(count, dtype=torch.bfloat16)
        else:
            yield (scale * torch.randn(count, generator=generator)).bfloat16()
        left -= count


def run_stage(stage: str, teacher: Path, out: Path, settings: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of one command in a process of its own."""
    chosen = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "moe_edge", stage, str(teacher), "--out", str(out), *chosen]
    environment = os.environ | {"MOE_EDGE_CACHE": str(out.parent / "cache")}
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"moe-edge {stage} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.2, help="of the checkpoint, 10^9 bytes")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--until", choices=("profile", "compress"), default="compress")
    parser.add_argument("--keep", type=Path, help="write there and leave it, instead of a temporary folder")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-edge-bench-")))
        for earlier in ("cache", "out"):  # what a kept folder already knows would not be measured again
            shutil.rmtree(folder / earlier, ignore_errors=True)
        config = config_for(options.gigabytes, options.layers)
        stored = write_teacher(folder / "teacher", config)
        settings = [
            f"calibration.tokens={options.tokens}", f"profile.cka_tokens={options.tokens // 8}",
            f"teacher.dtype={options.dtype}", "profile.mode=layerwise", "plan.experts=0.5", "plan.criterion=msan",
            "plan.tokens=1024", "plan.curve_tokens=512", "plan.force=true",  # random weights: any choice is as bad
        ]  # fmt: skip
        stages = ("profile", "compress")[: 1 if options.until == "profile" else 2]
        measured = {stage: run_stage(stage, folder / "teacher", folder / "out", settings) for stage in stages}
        print(json.dumps(result(folder, config, stored, options, measured)))


def result(
    folder: Path,
    config: Qwen3MoeConfig,
    stored: int,
    options: argparse.Namespace,
    measured: dict[str, tuple[float, int]],
) -> dict[str, object]:
    """The JSON line."""
    teacher = StreamedModel(folder / "teacher", torch.bfloat16)
    layer, embedding = (
        max(teacher.part_bytes(index) for index in range(options.layers)),
        teacher.part_bytes("embedding"),
    )
    peak = max(bytes_ for _, bytes_ in measured.values())
    return {
        "name": "layerwise", "gigabytes": round(stored / 1e9, 2), "layers": options.layers, "tokens": options.tokens,
        "experts": config.num_experts, "hidden": config.hidden_size, "width": config.moe_intermediate_size,
        "dtype": options.dtype, "threads": torch.get_num_threads(),
        "profile_tokens_per_s": round(options.tokens / measured["profile"][0], 2),
        "seconds": {stage: round(seconds, 1) for stage, (seconds, _) in measured.items()},
        "peak_rss_mib": {stage: round(bytes_ / MIB, 1) for stage, (_, bytes_) in measured.items()},
        "limit_gib": LIMIT_GIB, "within_limit": peak <= LIMIT_GIB * GIB,
        "largest_layer_mib": round(layer / MIB, 1), "embedding_mib": round(embedding / MIB, 1),
        "ratio": round(measured["profile"][1] / (FACTOR * layer + embedding), 3),
        "goal": f"ratio <= 1, peak of every stage <= {LIMIT_GIB} GiB",
    }  # fmt: skip


if __name__ == "__main__":
    main()
