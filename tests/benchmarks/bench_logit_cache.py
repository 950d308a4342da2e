"""Prints the logit cache's ratios as JSON lines: bytes per token, row read time, and what each coding costs in gradient.

Run: `python -m tests.benchmarks.bench_logit_cache [--teacher FOLDER]`. Without a teacher the logits are synthetic
(Zipf-like with noise, the student a perturbed copy); with one they are the model's own on calibration text, and the
student is the same model with noise on its weights. Files and their reading are the real ones in both cases.

The table `gradient_error` holds the relative L2 error of the loss's gradient against that of the full KL, for k = 16, 32,
64: with the exact tail bucket (this cache, read back from its file), with the teacher renormalised on the kept ids, and
with both renormalised. `draws` is random sampling with 50 draws: one set, and the mean of 16 sets, whose error falls by 4
because each set is unbiased.

Shape suffixes: S tokens of a row, V vocabulary, K kept ids.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_edge.formulas.divergence import cached_kl, forward_kl, head_pair, kl_dense, teacher_topk
from moe_edge.formulas.logit_views import WholeLogits
from moe_edge.formulas.sampling import draw, sampled_kl
from moe_edge.models.loading import load_model, load_tokenizer
from moe_edge.storage.logit_codec import RowCodec
from moe_edge.storage.logit_shards import (
    SHARDS_SCHEMA,
    ShardedLogits,
    begin_capture,
    finish_capture,
    shard_span,
    write_shard,
)
from moe_edge.storage.logits import LogitCache, LogitCacheWriter, TeacherRow
from moe_edge.storage.rows import TokenRows
from moe_edge.texts.recipes import load_recipe
from moe_edge.texts.rows import calibration_rows

VOCAB, TOKENS, ROWS, K = 151_936, 512, 8, 32
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0)
READS = 200
DRAWS, DRAW_SETS = 50, 16


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


def both_renormalised(teacher_SV: Tensor, student_SV: Tensor, k: int, temperature: float) -> Tensor:
    """Teacher and student given that the token is one of the k."""
    values_SK, indices_SK = teacher_SV.topk(k)
    return forward_kl(*head_pair(WholeLogits(student_SV), indices_SK, values_SK, temperature))


def from_file(teacher_SV: Tensor, k: int) -> TeacherRow:
    """What the cache gives back after it was written to a file."""
    ids_S = np.arange(len(teacher_SV))
    with tempfile.TemporaryDirectory() as folder:
        with LogitCacheWriter(Path(folder) / "l.h5", teacher_SV.shape[1], k, TEMPERATURES, {}) as writer:
            writer.append(ids_S, *teacher_topk(teacher_SV, k, TEMPERATURES))
        with LogitCache(Path(folder) / "l.h5") as cache:
            row = cache.row(ids_S)
    assert isinstance(row, TeacherRow)
    return row


def gradient_table(teacher_SV: Tensor, student_SV: Tensor, source: str) -> None:
    """Prints one line per k and temperature, and one per temperature for random draws."""
    student_SV = student_SV.requires_grad_()
    for temperature in (1.0, 2.0):
        full = gradient(kl_dense(teacher_SV, student_SV, temperature), student_SV)

        def error(slope_SV: Tensor, full: Tensor = full) -> float:
            return round(float((slope_SV - full).norm() / full.norm()), 4)

        for k in (16, 32, 64):
            row = from_file(teacher_SV, k)
            tail_S = torch.from_numpy(row.tail_logmass_SH[:, TEMPERATURES.index(temperature)].copy())
            kept = (torch.from_numpy(row.indices_SK), torch.from_numpy(row.logprobs_SK))
            ours = error(gradient(cached_kl(WholeLogits(student_SV), *kept, tail_S, temperature), student_SV))
            plain = error(gradient(renormalised(teacher_SV, student_SV, k, temperature), student_SV))
            both = error(gradient(both_renormalised(teacher_SV, student_SV, k, temperature), student_SV))
            values = {"with_tail": ours, "teacher_renormalised": plain, "both_renormalised": both}
            line = {"name": "gradient_error", "teacher": source, "k": k, "temperature": temperature}
            print(json.dumps(line | values))
        generator, total, one = torch.Generator().manual_seed(0), torch.zeros_like(full), 0.0
        for repeat in range(DRAW_SETS):
            drawn = draw(teacher_SV, DRAWS, temperature, generator)
            slope_SV = gradient(sampled_kl(WholeLogits(student_SV), *drawn, temperature), student_SV)
            one = error(slope_SV) if repeat == 0 else one
            total += slope_SV
        line = {"name": "gradient_error", "teacher": source, "draws": DRAWS, "temperature": temperature}
        unique = round(float((drawn.counts_TU > 0).sum(-1).float().mean()), 1)
        print(
            json.dumps(line | {"one_set": one, f"mean_of_{DRAW_SETS}": error(total / DRAW_SETS), "unique_ids": unique})
        )


def model_pair(folder: Path, tokens: int) -> tuple[Tensor, Tensor]:
    """(teacher, student) logits of a checkpoint and of the same with 10 % noise on its weights."""
    row = calibration_rows(load_recipe("default"), load_tokenizer(folder), tokens, tokens, 0).ids_NS[0]
    ids_1S, logits, model = torch.from_numpy(row).long()[None], [], load_model(folder)
    with torch.no_grad():
        for noise in (0.0, 0.1):
            for parameter in model.parameters():
                parameter.add_(noise * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0)
            logits.append(model(ids_1S).logits[0])
    return logits[0], logits[1]


def write_caches(folder: Path) -> list[np.ndarray]:
    """A file and a folder of shards with the same ROWS rows; returns their ids."""
    ids = [np.random.default_rng(row).integers(0, VOCAB, TOKENS).astype(np.int32) for row in range(ROWS)]
    top = teacher_topk(logits_pair(64, 0)[0].repeat(TOKENS // 64, 1), K, TEMPERATURES)
    with LogitCacheWriter(folder / "logits.h5", VOCAB, K, TEMPERATURES, {"teacher": "synthetic"}) as writer:
        for row_ids in ids:
            writer.append(row_ids, *top)
    rows, codec = TokenRows(np.stack(ids), ROWS * TOKENS), RowCodec(TOKENS, K, VOCAB, TEMPERATURES)
    pins = {"schema": SHARDS_SCHEMA, "rows": rows.digest, "shard_rows": ROWS // 2}
    record = codec.encode(*(column.numpy() for column in top))
    for number in begin_capture(folder / "shards", pins, rows):
        part = [ids[row] for row in shard_span(pins, number, ROWS)]
        write_shard(folder / "shards", pins, number, codec, part, [record] * len(part))
    finish_capture(folder / "shards", pins, {})
    return ids


def read_ms(cache: LogitCache | ShardedLogits, ids: list[np.ndarray]) -> float:
    """Median time of reading a row."""
    times_ms = []
    for read in range(READS):
        started = time.perf_counter()
        cache.row(ids[read % ROWS])
        times_ms.append(1e3 * (time.perf_counter() - started))
    return round(statistics.median(times_ms), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a checkpoint folder whose own logits are coded")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        ids = write_caches(Path(folder))
        size = (Path(folder) / "logits.h5").stat().st_size / (ROWS * TOKENS)
        print(json.dumps({"name": "logit_cache_bytes_per_token", "value": round(size, 2), "goal": "<= 120"}))
        shards = ShardedLogits(Path(folder) / "shards")
        with LogitCache(Path(folder) / "logits.h5") as cache:
            for name, opened in (("row_read_ms", cache), ("shard_row_read_ms", shards)):
                print(json.dumps({"name": name, "value": read_ms(opened, ids), "goal": "<= 0.3"}))
        shards.close()
    pair = logits_pair(64, 0) if options.teacher is None else model_pair(options.teacher, 256)
    gradient_table(*pair, source="synthetic" if options.teacher is None else options.teacher.name)


if __name__ == "__main__":
    main()
