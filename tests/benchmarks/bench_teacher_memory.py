"""Peak memory of distillation with the teacher in the cache against the teacher in memory, on the same run.

    python -m tests.benchmarks.bench_teacher_memory [--teacher FOLDER] [--keep-experts 0.5] [--steps 4] [--tokens 128]

Without a folder a random Qwen3-MoE of about 100 million parameters is written. Its student keeps a share of the experts. The
teacher's logits are captured once; then the same Trainer runs the same steps on the same rows twice, each time in a process
of its own: once with the cache, once with the live teacher as a stage with `teacher: live` has it. The cached KL is a lower
bound of the live one, which sees the whole vocabulary. Peaks are the kernel's high-water mark of resident memory, which
includes the libraries; `above_start_mib` is the rise over the process before any model was loaded. Prints one JSON line per
source and one with the ratios.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_edge.distillation.capture import CaptureConfig, captured_signal
from moe_edge.distillation.signal import CachedSignal
from moe_edge.distillation.teacher import LiveTeacher, teacher_model
from moe_edge.distillation.terms import Needs
from moe_edge.distillation.trainer import DistillationTrainer, DistillationTrainingArguments, RowDataset
from moe_edge.metrics.memory import high_water_bytes
from moe_edge.models.loading import hashed, load_model, read_checkpoint, save_student
from moe_edge.models.pruning import prune
from moe_edge.models.views import moe_layers
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.rows import TokenRows
from tests.tiny import TOKENIZER_SIZE, tiny_checkpoint

K, ROWS, TEMPERATURE = 32, 8, 2.0
MIB = 2**20


def train(folder: Path, teacher: Path, source: str, steps: int) -> dict[str, Any]:
    """A few optimizer steps of the student; what they cost in memory, and their losses."""
    start = high_water_bytes()
    student = load_model(folder / "student")
    cached = CachedSignal(folder / "cache", {})
    vocab, rows = cached.vocab, TokenRows.load(folder / "cache" / "rows.safetensors")
    source_of: dict[str, Any] = {"signal": cached}
    if source == "live":
        source_of = {"teacher": LiveTeacher(teacher_model(teacher, torch.device("cpu")), Needs())}
    settings = DistillationTrainingArguments(
        output_dir=str(folder / source), use_cpu=True, save_strategy="no", logging_steps=1, max_steps=steps,
        per_device_train_batch_size=2, learning_rate=1e-4, distillation_alpha=1.0, distillation_temperature=TEMPERATURE,
        loss_weights={"kl": 1.0},
    )  # fmt: skip
    trainer = DistillationTrainer(student.train(), settings, RowDataset(rows.ids_NS), vocab=vocab, **source_of)
    trainer.train()
    losses = [entry["kl_loss"] for entry in trainer.state.log_history if "kl_loss" in entry]
    peak = high_water_bytes()
    if start is None or peak is None:
        raise SystemExit("this system does not tell a process's peak memory")
    return {
        "name": "distillation_memory", "source": source, "peak_rss_mib": round(peak / MIB, 1),
        "above_start_mib": round((peak - start) / MIB, 1), "kl_loss": [round(value, 4) for value in losses],
    }  # fmt: skip


def prepare(folder: Path, teacher: Path, keep: float, tokens: int) -> None:
    """The student and the cache, in a process that ends before anything is measured."""
    vocab = inspect_checkpoint(teacher).config["vocab_size"]
    ids_NS = np.random.default_rng(0).integers(3, min(vocab, TOKENIZER_SIZE), (ROWS, tokens)).astype(np.int32)
    config = CaptureConfig(k=K, temperatures=(TEMPERATURE,))
    captured_signal(hashed(read_checkpoint(teacher)), TokenRows(ids_NS, ids_NS.size), folder / "cache", config).close()
    student = load_model(teacher)
    prune(student, {view.index: list(range(max(view.top_k, int(keep * view.count)))) for view in moe_layers(student)})
    save_student(student, teacher, folder / "student")


def in_a_process(task: str, folder: Path, teacher: Path, options: argparse.Namespace) -> str:
    command = [sys.executable, "-m", "tests.benchmarks.bench_teacher_memory", "--task", task, "--folder", str(folder)]
    command += ["--teacher", str(teacher), "--steps", str(options.steps), "--tokens", str(options.tokens)]
    command += ["--keep-experts", str(options.keep_experts)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def compare(options: argparse.Namespace, folder: Path) -> None:
    teacher = options.teacher or tiny_checkpoint(
        folder, "qwen3_moe", experts=32, top_k=4, layers=8, hidden=512, width=256, vocab=4096
    )
    in_a_process("prepare", folder, teacher, options)
    lines = [in_a_process(source, folder, teacher, options) for source in ("cached", "live")]
    print("\n".join(lines))
    cached, live = map(json.loads, lines)
    weights = inspect_checkpoint(teacher).total_bytes
    ratios = {name: round(cached[name] / live[name], 3) for name in ("peak_rss_mib", "above_start_mib")}
    line = {"name": "cached_over_live", **ratios, "teacher_mib": round(weights / MIB, 1), "goal": "< 1"}
    print(json.dumps(line | {"saved_mib": round(live["peak_rss_mib"] - cached["peak_rss_mib"], 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a checkpoint folder; its tokens are drawn at random")
    parser.add_argument("--keep-experts", type=float, default=0.5, help="share of the experts that the student keeps")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--task", choices=("compare", "prepare", "cached", "live"), default="compare")
    parser.add_argument("--folder", type=Path, help="where the parts of a comparison meet")
    options = parser.parse_args()
    torch.manual_seed(0)
    with ExitStack() as stack:
        temporary = options.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-edge-bench-"))
        if options.task == "compare":
            compare(options, Path(temporary))
        elif options.task == "prepare":
            prepare(Path(temporary), options.teacher, options.keep_experts, options.tokens)
        else:
            print(json.dumps(train(Path(temporary), options.teacher, options.task, options.steps)))


if __name__ == "__main__":
    main()
