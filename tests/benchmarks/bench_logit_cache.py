"""Prints the logit cache's ratios as JSON lines: bytes per token, gradient error against top-64, row read time.

Run: `python -m tests.benchmarks.bench_logit_cache`. The teacher is synthetic (Zipf-like logits with noise, the student
a perturbed copy), the cache file and its reading are the real ones.

Shape suffixes: S tokens of a row, V vocabulary, K kept ids.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_edge.formulas.divergence import cached_kl, kl_dense, teacher_topk
from moe_edge.storage.logits import LogitCache, LogitCacheWriter, TeacherRow

VOCAB, TOKENS, ROWS, K = 151_936, 512, 8, 32
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0)
READS = 200


def logits_pair(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """(teacher, student) logits with a heavy tail: the top 64 hold about 73 % of the mass."""
    generator = torch.Generator().manual_seed(seed)
    rank_V = torch.arange(1, VOCAB + 1, dtype=torch.float32)
    teacher_SV = -1.25 * rank_V.log() + 1.0 * torch.randn(tokens, VOCAB, generator=generator)
    student_SV = teacher_SV + 0.5 * torch.randn(tokens, VOCAB, generator=generator)
    order_V = torch.randperm(VOCAB, generator=generator)
    return teacher_SV[:, order_V], student_SV[:, order_V]


def gradient(loss_T: Tensor, student_SV: Tensor) -> Tensor:
    (slope_SV,) = torch.autograd.grad(loss_T.sum(), student_SV)
    return slope_SV


def renormalised(teacher_SV: Tensor, student_SV: Tensor, k: int, temperature: float) -> Tensor:
    """The usual truncated loss: top-k renormalised to one, against the student's whole softmax."""
    values_SK, indices_SK = (teacher_SV / temperature).topk(k)
    target_SK = values_SK.softmax(-1)
    student_SK = (student_SV / temperature).log_softmax(-1).gather(-1, indices_SK)
    return (target_SK * (target_SK.log() - student_SK)).sum(-1)


def gradient_errors(row: TeacherRow, teacher_SV: Tensor, student_SV: Tensor, temperature: float) -> tuple[float, float]:
    """Relative L2 error of the gradient (from the cache read back, from top-64 renormalised)."""
    student_SV = student_SV.requires_grad_()
    full = gradient(kl_dense(teacher_SV, student_SV, temperature), student_SV)
    tail_S = torch.from_numpy(row.tail_logmass_SH[:, TEMPERATURES.index(temperature)].copy())
    kept = (torch.from_numpy(row.indices_SK), torch.from_numpy(row.logprobs_SK))
    ours = gradient(cached_kl(student_SV, *kept, tail_S, temperature), student_SV)
    other = gradient(renormalised(teacher_SV, student_SV, 64, temperature), student_SV)
    return float((ours - full).norm() / full.norm()), float((other - full).norm() / full.norm())


def write_cache(path: Path) -> tuple[list[np.ndarray], Tensor, Tensor]:
    """A cache of ROWS rows; returns their ids and the logits of the first 64 tokens of the first row."""
    ids = [np.random.default_rng(row).integers(0, VOCAB, TOKENS) for row in range(ROWS)]
    teacher_SV, student_SV = logits_pair(64, 0)
    with LogitCacheWriter(path, VOCAB, K, TEMPERATURES, {"teacher": "synthetic"}) as writer:
        top = teacher_topk(teacher_SV.repeat(TOKENS // 64, 1), K, TEMPERATURES)
        for row_ids in ids:
            writer.append(row_ids, *top)
    return ids, teacher_SV, student_SV


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits.h5"
        ids, teacher_SV, student_SV = write_cache(path)
        size = path.stat().st_size / (ROWS * TOKENS)
        print(json.dumps({"name": "logit_cache_bytes_per_token", "value": round(size, 2), "goal": "<= 120"}))
        with LogitCache(path) as cache:
            times_ms = []
            for read in range(READS):
                started = time.perf_counter()
                row = cache.row(ids[read % ROWS])
                times_ms.append(1e3 * (time.perf_counter() - started))
            row = cache.row(ids[0])
        first = TeacherRow(row.indices_SK[:64], row.logprobs_SK[:64], row.tail_logmass_SH[:64])
        for temperature in (1.0, 2.0):
            ours, other = gradient_errors(first, teacher_SV, student_SV, temperature)
            values = {"temperature": temperature, "cache_k32": round(ours, 4), "renormalised_k64": round(other, 4)}
            print(
                json.dumps({"name": "gradient_error_ratio", "value": round(ours / other, 4), "goal": "< 1", **values})
            )
        print(json.dumps({"name": "row_read_ms", "value": round(statistics.median(times_ms), 4), "goal": "<= 0.3"}))


if __name__ == "__main__":
    main()
