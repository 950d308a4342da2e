"""One judge of quality: KL divergence, top-1 agreement and perplexity of an artifact's own logits against a reference.

Rows stream through `QualityJudge.add`; only sums are kept. Position s predicts token s + 1, so a row of S tokens gives S - 1
positions, and all numbers are taken over exactly those. Everything accumulates in float64; the KL is the one formula of
formulas/divergence.py. Its parts (KL per token, agreement, perplexity) serve the export's parity, too.
Legend: N rows, S sequence, T positions of a chunk, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from moe_edge.contracts.errors import InputRejected
from moe_edge.formulas.divergence import forward_kl

CHUNK_ELEMENTS = 1 << 22  # T x V values per float64 chunk, so that a 150 k vocabulary needs no gigabytes
BOOTSTRAP_SAMPLES = 2000

DEFINITIONS = {
    "kl_nats": "mean over positions of sum_v p(v) (ln p(v) - ln q(v)), p = teacher (or HF student), q = artifact, "
    "full vocabulary, natural logarithm; [..] is a bootstrap 95% interval over rows of text",
    "top1_agreement": "share of positions where the artifact's most likely token is the reference's",
    "perplexity": "exp(mean negative log-likelihood of the next token), same held-out tokens for every column",
}


@dataclass(frozen=True)
class Score:
    """An artifact against one reference; a failed score has null numbers and a reason."""

    kl_nats: float | None
    kl_nats_ci95: tuple[float, float] | None
    top1_agreement: float | None
    perplexity: float | None
    reference_perplexity: float | None
    n_tokens: int
    n_rows: int
    reason: str | None = None


@dataclass(frozen=True)
class _RowSums:
    kl: float
    agree: int
    nll: float
    reference_nll: float
    tokens: int


class QualityJudge:
    """Streams rows of logits and sums them up; one judge per (reference, artifact)."""

    def __init__(self) -> None:
        self._rows: list[_RowSums] = []
        self._failure: str | None = None

    def add(self, reference_SV: np.ndarray, artifact_SV: np.ndarray, ids_S: np.ndarray) -> None:
        """Add one row.

        Args:
            reference_SV: logits of the teacher (or student).
            artifact_SV: logits of the artifact for the same tokens.
            ids_S: the tokens themselves; token s + 1 is the target of position s.

        Raises:
            InputRejected: the vocabularies differ, or the reference is not finite.
            ValueError: fewer than two tokens, or logits and tokens of different lengths.
        """
        _check_shapes(reference_SV, artifact_SV, ids_S)
        row = len(self._rows)
        if not np.isfinite(reference_SV).all():
            raise InputRejected("the reference model's logits are not finite", where=f"row {row}")
        bad_S = ~np.isfinite(artifact_SV).all(axis=1)
        if bad_S.any() and self._failure is None:
            self._failure = f"NaN or infinite logits at row {row}, position {int(bad_S.argmax())}"
        if self._failure is None:
            self._rows.append(row_sums(reference_SV[:-1], artifact_SV[:-1], ids_S[1:]))

    def result(self) -> Score:
        """The score over all rows added so far."""
        failure = self._failure or (None if self._rows else "no row was judged")
        if failure:
            return Score(None, None, None, None, None, 0, 0, failure)
        tokens = sum(row.tokens for row in self._rows)
        mean_nll = sum(row.nll for row in self._rows) / tokens
        reference_nll = sum(row.reference_nll for row in self._rows) / tokens
        perplexity, reason = _perplexity(mean_nll)
        return Score(
            kl_nats=max(sum(row.kl for row in self._rows) / tokens, 0.0),  # rounding may leave -1e-17
            kl_nats_ci95=bootstrap_ci95([row.kl for row in self._rows], [row.tokens for row in self._rows]),
            top1_agreement=sum(row.agree for row in self._rows) / tokens,
            perplexity=perplexity,
            reference_perplexity=_perplexity(reference_nll)[0],
            n_tokens=tokens,
            n_rows=len(self._rows),
            reason=reason,
        )


def _check_shapes(reference_SV: np.ndarray, artifact_SV: np.ndarray, ids_S: np.ndarray) -> None:
    if reference_SV.shape[1] != artifact_SV.shape[1]:
        raise InputRejected(
            f"the artifact's vocabulary has {artifact_SV.shape[1]} entries, the reference's {reference_SV.shape[1]}",
            why="KL and agreement compare token by token: both models need the same tokenizer",
        )
    if not len(reference_SV) == len(artifact_SV) == len(ids_S) >= 2:
        raise ValueError(f"rows differ: {len(reference_SV)}, {len(artifact_SV)} logits for {len(ids_S)} tokens")


def log_probs(logits_TV: np.ndarray) -> Tensor:
    """ln softmax over the last axis, float64 [T, V]."""
    return torch.log_softmax(torch.from_numpy(np.asarray(logits_TV, dtype=np.float64)), -1)


def chunks(tokens: int, vocab: int) -> Iterator[slice]:
    """Positions 0 .. tokens in parts of CHUNK_ELEMENTS logits, or of one position."""
    step = max(1, CHUNK_ELEMENTS // vocab)
    yield from (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def kl_per_token(reference_TV: np.ndarray, artifact_TV: np.ndarray) -> NDArray[np.float64]:
    """KL(softmax(reference) || softmax(artifact)) of every row of logits, [T] nats; NaN where a logit is not finite."""
    parts = chunks(*reference_TV.shape)
    kl = [forward_kl(log_probs(reference_TV[part]), log_probs(artifact_TV[part])).numpy() for part in parts]
    return np.concatenate(kl)


def agreement(reference_TV: np.ndarray, artifact_TV: np.ndarray) -> NDArray[np.bool_]:
    """Where both models think the same token the likeliest, [T]."""
    same: NDArray[np.bool_] = reference_TV.argmax(-1) == artifact_TV.argmax(-1)
    return same


def perplexity(logits_SV: np.ndarray, ids_S: np.ndarray) -> float | None:
    """exp of the mean negative log-likelihood of every next token; None where it overflows."""
    targets_T = ids_S[1:]
    parts = chunks(len(targets_T), logits_SV.shape[1])
    total = sum(_nll(log_probs(logits_SV[part]), targets_T[part]) for part in parts)
    return _perplexity(total / len(targets_T))[0]


def row_sums(reference_TV: np.ndarray, artifact_TV: np.ndarray, targets_T: np.ndarray) -> _RowSums:
    """Sums over positions, in chunks: KL(reference || artifact), equal argmax, negative log-likelihoods."""
    kl = nll = reference_nll = 0.0
    agree = 0
    for part in chunks(*reference_TV.shape):
        p_TV, q_TV = log_probs(reference_TV[part]), log_probs(artifact_TV[part])
        kl += float(forward_kl(p_TV, q_TV).sum())
        agree += int(agreement(reference_TV[part], artifact_TV[part]).sum())
        nll += _nll(q_TV, targets_T[part])
        reference_nll += _nll(p_TV, targets_T[part])
    return _RowSums(kl, agree, nll, reference_nll, len(targets_T))


def _nll(logprobs_TV: Tensor, targets_T: np.ndarray) -> float:
    """Sum of the negative log-likelihoods of the targets, nats."""
    targets_T1 = torch.from_numpy(targets_T.astype(np.int64))[:, None]
    return -float(logprobs_TV.gather(-1, targets_T1).sum())


def _perplexity(mean_nll_nats: float) -> tuple[float | None, str | None]:
    if mean_nll_nats > 700:  # exp would overflow float64
        return None, f"perplexity overflows: mean negative log-likelihood {mean_nll_nats:.0f} nats"
    return math.exp(mean_nll_nats), None


def bootstrap_ci95(sums_N: list[float], tokens_N: list[int], seed: int = 0) -> tuple[float, float] | None:
    """95% percentile interval of sum(sums) / sum(tokens) when whole rows are resampled; None with a single row.

    Rows, not tokens, are drawn, because tokens of one text are not independent (Efron & Tibshirani 1993, chapter 8).
    """
    sums, tokens = np.asarray(sums_N), np.asarray(tokens_N)

    def means(draws_BN: NDArray[np.int64]) -> NDArray[np.float64]:
        means_B: NDArray[np.float64] = sums[draws_BN].sum(1) / tokens[draws_BN].sum(1)
        return means_B

    interval = resampled_ci95(len(sums_N), means, BOOTSTRAP_SAMPLES, seed)
    return None if interval is None else (max(interval[0], 0.0), max(interval[1], 0.0))


def resampled_ci95(
    rows: int, values_of: Callable[[NDArray[np.int64]], ArrayLike], samples: int, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of a statistic when rows are drawn with replacement; None with a single row.

    Args:
        values_of: row numbers of every draw [B, N] -> the statistic of each, [B].
        samples: B.
    """
    if rows < 2:
        return None
    draws_BN = np.random.default_rng(seed).integers(rows, size=(samples, rows))
    low, high = np.percentile(np.asarray(values_of(draws_BN)), [2.5, 97.5])
    return float(low), float(high)
