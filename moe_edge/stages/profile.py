"""Stage profile: one pass of the teacher over the calibration rows; all later decisions are functions of its results.

Writes statistics.safetensors, logits.h5 (the teacher's top-k for distillation), imatrix.gguf, rows.safetensors (the
very tokens) and calibration.json (where they came from). After a kill it goes on behind the last saved shard of
rows.

Shape suffixes: L layers, E experts, N rows, S tokens of a row, V vocabulary.
"""

import hashlib
import logging
import shutil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.spec import ModelSpec
from moe_edge.export.imatrix import write_imatrix_gguf
from moe_edge.families import family_of
from moe_edge.families.loading import load_model, load_tokenizer
from moe_edge.formulas.cka import cka_from_hsic
from moe_edge.formulas.divergence import teacher_topk
from moe_edge.profiling.calibration import calibration_rows
from moe_edge.profiling.passes import OnLogits, run_pass
from moe_edge.profiling.recipes import LoadedRecipe, load_recipe
from moe_edge.profiling.sums import to_statistics
from moe_edge.storage.checkpoint import inspect_checkpoint, tokenizer_files
from moe_edge.storage.files import sha256_file, write_json_atomic
from moe_edge.storage.logits import LogitCacheWriter
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics

log = logging.getLogger(__name__)
DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}


def run(context: StageContext) -> dict[str, Any]:
    """Profile the teacher; returns tokens, rows, dead experts, sink share, mean CKA and gate mass per layer.

    Raises:
        ConfigError: mode layerwise, rows longer than the model's context, no or too little text.
        InputRejected: the teacher or the text cannot be read.
    """
    config = context.config
    spec = _spec(context)
    _check(config, spec)
    recipe, tokenizer = load_recipe(config.calibration.recipe), load_tokenizer(context.teacher)
    asked = config.calibration
    rows = calibration_rows(recipe, tokenizer, asked.tokens, asked.sequence_length, asked.seed)
    statistics = _profile(context, spec, recipe, rows)
    rows.save(context.out / "rows.safetensors")
    statistics.save(context.out / "statistics.safetensors")
    write_imatrix_gguf(context.out / "imatrix.gguf", statistics, spec)
    write_json_atomic(context.out / "calibration.json", _origin(config, recipe, rows))
    shutil.rmtree(context.out / "partial")
    return _summary(statistics, rows)


def _spec(context: StageContext) -> ModelSpec:
    config = inspect_checkpoint(context.teacher).config
    return family_of(config).spec(config)


def _check(config: BuildConfig, spec: ModelSpec) -> None:
    if config.profile.mode == "layerwise":
        raise ConfigError("profile.mode 'layerwise' is not available in this version", why="available: whole, auto")
    if config.calibration.sequence_length > spec.context_length:
        raise ConfigError(
            f"calibration.sequence_length {config.calibration.sequence_length} exceeds the model's context",
            why=f"the teacher reads at most {spec.context_length} tokens",
            next_command=f"--set calibration.sequence_length={spec.context_length}",
        )


def _identity(context: StageContext, spec: ModelSpec, rows: TokenRows) -> dict[str, str]:
    """What pins the logit cache and the saved state of the pass."""
    tokenizer = hashlib.sha256("".join(sha256_file(path) for path in tokenizer_files(context.teacher)).encode())
    return {
        "teacher": context.teacher_digest,
        "tokenizer": tokenizer.hexdigest(),
        "calibration": rows.digest,
        "vocab": str(spec.vocab),
    }


def _profile(context: StageContext, spec: ModelSpec, recipe: LoadedRecipe, rows: TokenRows) -> Statistics:
    """The pass itself; the logit cache is written while it runs."""
    profile, asked = context.config.profile, context.config.calibration
    dtype = context.config.teacher.dtype
    model = load_model(context.teacher, DTYPES[dtype])
    identity = _identity(context, spec, rows)
    temperatures = sorted({1.0, *profile.logits.temperatures})
    with LogitCacheWriter(context.out / "logits.h5", spec.vocab, profile.logits.k, temperatures, identity) as cache:
        sums = run_pass(
            model,
            rows.ids_NS,
            cka_tokens=profile.cka_tokens,
            partial=context.out / "partial",
            identity=identity | {"cka_tokens": profile.cka_tokens, "dtype": dtype},
            on_logits=cache_logits(cache, spec.vocab),
        )
    meta = {"teacher_digest": context.teacher_digest, "calibration_digest": rows.digest, "recipe": recipe.name}
    return to_statistics(sums, meta | {"seed": asked.seed, "sequence_length": asked.sequence_length, "dtype": dtype})


def cache_logits(cache: LogitCacheWriter, vocab: int) -> OnLogits:
    """Writes every row's top-k into the cache, unless an earlier run already did."""

    def on_logits(ids_S: np.ndarray, logits_SV: Tensor) -> None:
        if ids_S not in cache:
            top = teacher_topk(logits_SV, cache.k, cache.temperatures, vocab)
            cache.append(ids_S, top.logprobs_TK, top.indices_TK, top.tail_logmass_TH)

    return on_logits


def _origin(config: BuildConfig, recipe: LoadedRecipe, rows: TokenRows) -> dict[str, Any]:
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


def _summary(statistics: Statistics, rows: TokenRows) -> dict[str, Any]:
    """What the report tells about the pass; lists have one entry per layer."""
    dead_LE = statistics.counts_LE == 0
    summary: dict[str, Any] = {
        "tokens": statistics.tokens,
        "asked_tokens": rows.asked_tokens,
        "rows": len(rows.ids_NS),
        "calibration_digest": rows.digest,
        "cka_tokens": statistics.cka_tokens,
        "dead_experts": [dead_E.nonzero().flatten().tolist() for dead_E in dead_LE],
        "sink_share": _rounded(statistics.sink_share_L),
        "gate_mass": _rounded(statistics.gate_mass_L),
        "router_entropy_nats": _rounded(statistics.router_entropy_L),
        "mean_cka": [_mean_cka(hsic_EE) for hsic_EE in statistics.hsic_LEE],
        "mean_gated_cka": [_mean_cka(hsic_EE) for hsic_EE in statistics.gated_hsic_LEE],
    }
    if rows.short:
        summary["note"] = f"the calibration text has only {rows.n_tokens} of the {rows.asked_tokens} tokens asked for"
    return summary


def _rounded(values_L: Tensor) -> list[float]:
    return [round(float(value), 6) for value in values_L]


def _mean_cka(hsic_EE: Tensor) -> float | None:
    """Mean over pairs of different experts with evidence; None when there is none."""
    cka_EE = cka_from_hsic(hsic_EE)
    pairs = cka_EE[~torch.eye(len(cka_EE), dtype=torch.bool)]
    known = pairs[~pairs.isnan()]
    return round(float(known.mean()), 6) if len(known) else None
