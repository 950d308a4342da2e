"""Stage profile: one pass of the teacher over the calibration rows; all later decisions are functions of its results.

Writes statistics.safetensors, logits.h5 (the teacher's top-k for distillation), imatrix.gguf, rows.safetensors (the
very tokens) and calibration.json (where they came from). The teacher is read whole, or layer by layer where it does not
fit into memory. After a kill the pass goes on behind the last saved shard of rows, or layer. Several processes share
the rows (process/ranks.py); each leaves its sums and logits in a folder of its own, and rank 0 merges them.

Shape suffixes: N rows, S tokens of a row, V vocabulary.
"""

import hashlib
import shutil
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_edge.contracts.artifacts import Placement, ProfileFolder, ProfileSummary
from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.spec import ModelSpec
from moe_edge.exporting.imatrix import write_imatrix_gguf
from moe_edge.formulas.divergence import teacher_topk
from moe_edge.models.loading import load_model, load_tokenizer, true_vocabulary
from moe_edge.models.streaming import StreamedModel
from moe_edge.process.placement import DTYPES, settled, to_run
from moe_edge.process.ranks import Ranks, current_ranks
from moe_edge.profiling.layerwise import run_layerwise
from moe_edge.profiling.passes import STATE, OnLogits, run_pass, share_of
from moe_edge.profiling.summary import profile_summary
from moe_edge.profiling.sums import PassSums, merged, to_statistics
from moe_edge.storage.checkpoint import tokenizer_files
from moe_edge.storage.files import sha256_file, write_json_atomic
from moe_edge.storage.logits import LogitCache, LogitCacheWriter
from moe_edge.storage.rows import TokenRows
from moe_edge.texts.recipes import LoadedRecipe, load_recipe
from moe_edge.texts.rows import calibration_rows

PARTIAL = "partial"


@dataclass(frozen=True)
class ProfileJob:
    """One process's pass, settled."""

    config: BuildConfig
    teacher: Teacher
    out: Path
    vocab: int  # true vocabulary
    rows: TokenRows
    ranks: Ranks
    placement: Placement
    identity: dict[str, str]  # of the logit cache; what pins the results

    def folder(self, rank: int) -> Path:
        """What a process leaves for resuming and merging; another number of processes begins anew."""
        return self.out / PARTIAL / f"rank-{rank}-of-{self.ranks.world}"

    def logits(self, rank: int) -> Path:
        """The logit cache of a process; one process alone writes the final one."""
        return (self.out if self.ranks.world == 1 else self.folder(rank)) / ProfileFolder.LOGITS

    @property
    def mode(self) -> str:
        """whole | layerwise, as the statistics name it."""
        return "whole" if self.placement.whole else "layerwise"

    def cache_writer(self, path: Path) -> LogitCacheWriter:
        wanted = self.config.profile.logits
        temperatures = sorted({1.0, *wanted.temperatures})
        return LogitCacheWriter(path, self.vocab, wanted.k, temperatures, self.identity)


def run(config: BuildConfig, teacher: Teacher, out: Path) -> ProfileSummary | None:
    """Profile the teacher; returns the summary, and nothing in the processes that only help.

    Raises:
        ConfigError: rows longer than the model's context, no or too little text.
        InputRejected: the teacher or the text cannot be read.
    """
    _check(config, teacher.spec)
    recipe, tokenizer = load_recipe(config.calibration.recipe), load_tokenizer(teacher.path)
    asked = config.calibration
    rows = calibration_rows(recipe, tokenizer, asked.tokens, asked.sequence_length, asked.seed)
    job = _job(config, teacher, out, true_vocabulary(tokenizer, teacher.spec.vocab), rows)
    sums = _pass(job)
    job.ranks.wait()
    return _results(job, sums, recipe) if job.ranks.leads else None


def _check(config: BuildConfig, spec: ModelSpec) -> None:
    if config.calibration.sequence_length > spec.context_length:
        raise ConfigError(
            f"calibration.sequence_length {config.calibration.sequence_length} exceeds the model's context",
            why=f"the teacher reads at most {spec.context_length} tokens",
            next_command=f"--set calibration.sequence_length={spec.context_length}",
        )


def _job(config: BuildConfig, teacher: Teacher, out: Path, vocab: int, rows: TokenRows) -> ProfileJob:
    ranks = current_ranks()
    tokenizer = hashlib.sha256("".join(sha256_file(path) for path in tokenizer_files(teacher.path)).encode())
    identity = {
        "teacher": teacher.digest,
        "tokenizer": tokenizer.hexdigest(),
        "calibration": rows.digest,
        "vocab": str(vocab),
    }
    placement = settled(out, lambda: to_run(teacher.headers, config.teacher.dtype, config.profile.mode, ranks), ranks)
    return ProfileJob(config, teacher, out, vocab, rows, ranks, placement, identity)


def _pass(job: ProfileJob) -> PassSums:
    """This process's share of the rows; the logit cache is written while it runs."""
    config, folder = job.config.profile, job.folder(job.ranks.rank)
    work = share_of(job.rows.ids_NS, config.cka_tokens, job.ranks.rank, job.ranks.world)
    identity = job.identity | {"cka_tokens": config.cka_tokens, "dtype": job.placement.dtype, "mode": job.mode}
    folder.mkdir(parents=True, exist_ok=True)
    cache = job.cache_writer(job.logits(job.ranks.rank))
    on_logits = cache_logits(cache, job.vocab)
    dtype, device = DTYPES[job.placement.dtype], torch.device(job.placement.device)
    with cache if work.shards else nullcontext():
        if job.placement.whole:
            model = load_model(job.teacher.path, dtype)
            model.to(device)  # type: ignore[arg-type]  # transformers hides nn.Module.to
            return run_pass(model, work, partial=folder, identity=identity, on_logits=on_logits)
        with StreamedModel(job.teacher.path, dtype, device, compact=True) as teacher:
            return run_layerwise(teacher, work, partial=folder, identity=identity, on_logits=on_logits)


def _results(job: ProfileJob, sums: PassSums, recipe: LoadedRecipe) -> ProfileSummary:
    """Merge what the processes left, write the stage's files, and sum up."""
    out, config = job.out, job.config
    if job.ranks.world > 1:
        sums = merged([PassSums.load(job.folder(rank) / STATE)[0] for rank in range(job.ranks.world)])
        _merge_logits(job)
    meta = {
        "teacher_digest": job.teacher.digest,
        "calibration_digest": job.rows.digest,
        "recipe": recipe.name,
        "seed": config.calibration.seed,
        "sequence_length": config.calibration.sequence_length,
        "dtype": job.placement.dtype,
        "mode": job.mode,
    }
    statistics = to_statistics(sums, meta)
    job.rows.save(out / ProfileFolder.ROWS)
    statistics.save(out / ProfileFolder.STATISTICS)
    write_imatrix_gguf(out / ProfileFolder.IMATRIX, statistics, job.teacher.spec)
    write_json_atomic(out / ProfileFolder.CALIBRATION, _origin(config, recipe, job.rows))
    shutil.rmtree(out / PARTIAL)
    return profile_summary(statistics, job.rows)


def _merge_logits(job: ProfileJob) -> None:
    """One cache with the rows in their order: the bytes that one process would have written."""
    paths = [job.logits(rank) for rank in range(job.ranks.world)]
    with ExitStack() as stack:
        caches = [stack.enter_context(LogitCache(path, job.identity)) for path in paths if path.is_file()]
        with job.cache_writer(job.out / ProfileFolder.LOGITS) as merged_cache:
            for ids_S in job.rows.ids_NS:
                merged_cache.take(ids_S, next(cache for cache in caches if ids_S in cache))


def cache_logits(cache: LogitCacheWriter, vocab: int) -> OnLogits:
    """Writes every row's top-k into the cache, unless an earlier run already did."""

    def on_logits(ids_S: np.ndarray, logits_SV: Tensor) -> None:
        if ids_S not in cache:
            top = teacher_topk(logits_SV, cache.k, cache.temperatures, vocab)
            cache.append(ids_S, top.logprobs_TK.cpu(), top.indices_TK.cpu(), top.tail_logmass_TH.cpu())

    return on_logits


def _origin(config: BuildConfig, recipe: LoadedRecipe, rows: TokenRows) -> dict[str, object]:
    """Where the tokens came from, with credits and licences."""
    return {
        "recipe": recipe.name,
        "sources": [source.model_dump() for source in recipe.recipe.sources],
        "tokens": rows.n_tokens,
        "asked_tokens": rows.asked_tokens,
        "sequence_length": config.calibration.sequence_length,
        "seed": config.calibration.seed,
        "digest": rows.digest,
        "row_digests": rows.row_digests(),
    }
