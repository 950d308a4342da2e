"""Parity: an exported file is reopened in its own runtime and compared with the Hugging Face student before it counts.

`compare` measures, `require` judges one file against the student, `agree` judges two formats of one student.

Full-precision exports must reproduce the student up to the runtime's arithmetic. A MoE is not continuous: where two experts
tie, a rounding error alone flips a token's routing, and the flipped token reaches the later ones of its row. Three rules
judge:

- number by number, over short rows of the fixed text (parity_rows.py), each up to its first near-tie, the clearest first;
- the KL over all tokens of the text, mean and median;
- the first greedy tokens: each must be the student's choice, or tied with it.

Where a model has too few tokens clear of ties, the first rule cannot be asked; the row says so with the count, and its limit
on the mean KL is that of UNCLEAR. Quantized files are not limited here (the target's gates do that), but their numbers
stand in the same table.

The two formats must also agree with each other. At full precision both must be the same function. The delivered, quantized
files differ by both their quantization errors: for small errors the square root of KL behaves like a distance, so
KL(gguf || onnx) should not exceed (sqrt(KL(student || gguf)) + sqrt(KL(student || onnx)))^2; twice that and a floor is the
limit, beyond which the two errors point in the same wrong direction of one of the files.

V vocabulary, S tokens of the text, T tokens clear of ties.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moe_edge.contracts.errors import GateFailed
from moe_edge.exporting.parity_rows import FIRM_GAP, NEAR_TIE_GAP, Greedy, Reference
from moe_edge.metrics.quality import agreement, kl_per_token, perplexity
from moe_edge.runtimes.base import Runtime

FULL_PRECISION = ("gguf F16", "onnx fp32")
PAIR_SLACK, PAIR_FLOOR_NATS = 2.0, 1e-3
NEAR_TIE_LOGITS = 0.05  # below the student's best logit: a quantized file's answer counts as the student's


@dataclass(frozen=True)
class ParityLimits:
    """Largest differences that count as the same model; None = not limited."""

    median_kl_nats: float
    kl_nats: float
    clear_max_abs_logit: float | None = None  # these two: over tokens clear of ties
    clear_p99_abs_logit: float | None = None
    tie_logits: float = NEAR_TIE_LOGITS  # below the student's best: as faithful an answer
    tie_gap: float = NEAR_TIE_GAP  # a token is clear of ties where all its routers' gaps are larger
    clear_needed: int = 1  # tokens without which the two cannot be asked


# fp32 graphs differ by summation order only: at most 1.1e-5 over all tiny families. llama.cpp rounds activations to fp16
# (11 bits) inside F16 products, which moves router scores, too: in models of 2 to 24 layers experts flipped at gaps of
# 1e-3 to 5e-3 (up to 16 of 466 tokens), none beyond, where the 99th percentile is 2e-3 to 4.5e-3. Among less than a hundred
# tokens it would be the matter of a single one.
LIMITS = {
    "gguf F16": ParityLimits(1e-3, 1e-3, clear_p99_abs_logit=5e-3, tie_logits=2e-2, tie_gap=FIRM_GAP, clear_needed=100),
    "onnx fp32": ParityLimits(1e-6, 1e-4, clear_max_abs_logit=1e-4, tie_logits=1e-3),
}
# (artifact, family): what is looser there, and why. Everything else is as above.
LOOSER: dict[tuple[str, str], tuple[dict[str, float], str]] = {
    ("gguf F16", "qwen3_5_moe"): (
        {"clear_p99_abs_logit": 1e-2},
        "linear attention with llama.cpp's own epsilon (1e-3 in float32 already): 99th percentile 6.7e-3 to 7.5e-3",
    ),
}
# Where too few tokens are clear of ties, the mean KL is that of a few flipped tokens: on a 134.8 M Qwen2-MoE with 30 layers
# 6e-4 nats or 1.9e-3 from one and the same file, by the precision of the KV cache alone; the median is 3e-5 to 1.5e-4.
UNCLEAR = {"gguf F16": {"kl_nats": 5e-3, "median_kl_nats": 5e-4}}


@dataclass(frozen=True)
class Parity:
    """One artifact against the student, on the same tokens; `clear` = clear of router ties, None where no token is."""

    max_abs_logit: float
    p99_abs_logit: float
    p99_relative: float
    logit_scale: float  # root mean square of the student's logits, at least 1
    kl_nats: float
    median_kl_nats: float
    top1_agreement: float
    perplexity: float | None  # of the next token of the fixed text
    student_perplexity: float | None
    greedy_equal: int  # leading greedy tokens that the student agrees with, or nearly
    greedy_compared: int
    n_tokens: int
    clear_tokens: int  # of the short rows, which are read beside the text
    clear_candidates: int  # tokens of short rows that were looked at
    clear_max_abs_logit: float | None
    clear_p99_abs_logit: float | None
    clear_kl_nats: float | None


def limits_of(kind: str, family: str) -> tuple[ParityLimits | None, str | None]:
    """The limits of an artifact and, where they are looser for its family, why."""
    kind = kind.removesuffix(" delivered").split(" (")[0]
    if kind not in LIMITS:
        return None, None
    changes, reason = LOOSER.get((kind, family), ({}, None))
    return replace(LIMITS[kind], **changes), reason  # type: ignore[arg-type]


def compare(
    expected: Reference,
    artifact: Runtime,
    continuation: Sequence[int],
    limits: ParityLimits | None = None,
    logits_SV: np.ndarray | None = None,
) -> Parity:
    """An open artifact against the student's reference.

    Args:
        continuation: its greedy tokens after the prompt, about which the student was asked.
        limits: of a full-precision file; they say which tokens are clear of ties.
        logits_SV: the artifact's own of the text, where they are known already.
    """
    if logits_SV is None:
        logits_SV = artifact.logits(expected.ids_S)
    scale = max(1.0, float(np.sqrt(np.square(expected.logits_SV, dtype=np.float64).mean())))
    limits = limits and _scaled(limits, scale)
    difference_SV = np.abs(logits_SV - expected.logits_SV)
    kl_S = kl_per_token(expected.logits_SV, logits_SV)
    p99, largest = float(np.quantile(difference_SV, 0.99)), float(difference_SV.max())
    return Parity(
        max_abs_logit=largest,
        p99_abs_logit=p99,
        p99_relative=p99 / float(np.abs(expected.logits_SV).max()),
        logit_scale=scale,
        kl_nats=float(kl_S.mean()),
        median_kl_nats=float(np.median(kl_S)),
        top1_agreement=float(agreement(expected.logits_SV, logits_SV).mean()),
        perplexity=perplexity(logits_SV, expected.ids_S),
        student_perplexity=perplexity(expected.logits_SV, expected.ids_S),
        greedy_equal=agreed_tokens(expected.greedy[tuple(continuation)], limits, largest),
        greedy_compared=len(continuation),
        n_tokens=len(expected.ids_S),
        clear_candidates=expected.candidates,
        **_clear(expected, artifact, limits.tie_gap if limits else NEAR_TIE_GAP),
    )


def _scaled(limits: ParityLimits, scale: float) -> ParityLimits:
    """The limits for logits of this size, to which rounding is relative. The tiny models that set them have 1; a 134.8 M model
    has 8 or more, where F16 is off by 1.8e-2 on text and 2.6e-2 on short rows (99th percentile), float32 by 1e-4 at most."""
    largest, p99 = limits.clear_max_abs_logit, limits.clear_p99_abs_logit
    return replace(
        limits,
        tie_logits=limits.tie_logits * scale,
        clear_max_abs_logit=largest and largest * scale,
        clear_p99_abs_logit=p99 and p99 * scale,
    )


def _clear(expected: Reference, artifact: Runtime, tie_gap: float) -> dict[str, Any]:
    """The differences over tokens whose gaps, and those of the tokens before them in their row, are beyond `tie_gap`."""
    differences, kl = [], []
    for row in expected.clear_rows:
        wanted = int((row.gap_S > tie_gap).sum())  # gaps fall along a row
        if wanted:
            artifact_TV, student_TV = artifact.logits(row.ids_S[:wanted]), row.logits_SV[:wanted]
            differences.append(np.abs(artifact_TV - student_TV))
            kl.append(kl_per_token(student_TV, artifact_TV))
    if not differences:
        return {"clear_tokens": 0} | dict.fromkeys(("clear_max_abs_logit", "clear_p99_abs_logit", "clear_kl_nats"))
    difference_TV = np.concatenate(differences)
    return {
        "clear_tokens": len(difference_TV),
        "clear_max_abs_logit": float(difference_TV.max()),
        "clear_p99_abs_logit": float(np.quantile(difference_TV, 0.99)),
        "clear_kl_nats": float(np.concatenate(kl).mean()),
    }


def agreed_tokens(student: Greedy, limits: ParityLimits | None, off_logits: float) -> int:
    """Leading greedy tokens that are the student's choice, or as good as that.

    From the first near-tie of a router on, a faithful file may have flipped, and be off by what it is on the text.
    """

    def differs(shortfall: float, gap: float) -> bool:
        if limits is None:
            return shortfall > NEAR_TIE_LOGITS
        return not shortfall <= (limits.tie_logits if gap > limits.tie_gap else max(limits.tie_logits, off_logits))

    pairs = zip(student.shortfalls, student.gaps, strict=True)
    return next((i for i, pair in enumerate(pairs) if differs(*pair)), len(student.gaps))


def require(kind: str, parity: Parity, family: str = "") -> dict[str, Any]:
    """The parity as a report row; a full-precision export beyond its limits is refused.

    Raises:
        GateFailed: the file does not compute the student's function.
    """
    limits, reason = limits_of(kind, family)
    row: dict[str, Any] = {"artifact": kind, **asdict(parity)}
    if limits is None:
        return row | {"limits": None, "passed": None, "rule": None}
    limits = _scaled(limits, parity.logit_scale)
    clear = parity.clear_tokens >= limits.clear_needed
    if not clear:
        looser = UNCLEAR.get(kind.removesuffix(" delivered"), {})
        limits = replace(limits, clear_max_abs_logit=None, clear_p99_abs_logit=None, **looser)  # type: ignore[arg-type]
        reason = f"{parity.clear_tokens} tokens are clear of router ties, {limits.clear_needed} are needed"
    faults = _beyond(parity, limits)
    if parity.greedy_equal < parity.greedy_compared:
        faults.append(f"greedy tokens differ at {parity.greedy_equal} of {parity.greedy_compared}")
    if faults:
        raise GateFailed(f"the {kind} export does not reproduce the student", why="; ".join(faults))
    rule = "logits, KL and greedy" if clear else "KL and greedy"
    return row | {"limits": asdict(limits), "passed": True, "rule": rule, "looser_because": reason}


_WORDS = {
    "median_kl_nats": ("median KL", "nats"),
    "kl_nats": ("mean KL", "nats"),
    "clear_max_abs_logit": ("largest logit difference of tokens clear of ties", ""),
    "clear_p99_abs_logit": ("99th percentile of logit differences of tokens clear of ties", ""),
}


def _beyond(parity: Parity, limits: ParityLimits) -> list[str]:
    found = []
    for name, (what, unit) in _WORDS.items():
        value, limit = getattr(parity, name), getattr(limits, name)
        if limit is not None and not value <= limit:  # a NaN is beyond every limit
            found.append(f"{what} is {value:.2e} > {limit:.0e} {unit}".rstrip())
    return found


def agree(
    gguf: str,
    onnx: str,
    gguf_SV: np.ndarray,
    onnx_SV: np.ndarray,
    student_SV: np.ndarray,
    full: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One row of parity.json: KL(gguf || onnx) on the fixed text, gated.

    Args:
        gguf, onnx: the rows' names of the two artifacts.
        gguf_SV, onnx_SV, student_SV: logits on the same tokens.
        full: of two full-precision files the limits of the GGUF against the student; None: they are quantized.

    Raises:
        GateFailed: the two files are further apart than their own errors explain.
    """
    kl_S = kl_per_token(gguf_SV, onnx_SV)
    kl, median = float(kl_S.mean()), float(np.median(kl_S))
    own = [float(kl_per_token(student_SV, logits_SV).mean()) for logits_SV in (gguf_SV, onnx_SV)]
    explained = PAIR_SLACK * sum(max(value, 0.0) ** 0.5 for value in own) ** 2 + PAIR_FLOOR_NATS
    limit, median_limit = (full["kl_nats"], full["median_kl_nats"]) if full else (explained, None)
    if not kl <= limit or (median_limit is not None and not median <= median_limit):
        found = f"KL is {kl:.2e} nats (median {median:.2e}), limit {limit:.2e}"
        why = f"{found}; against the student {own[0]:.2e} and {own[1]:.2e}"
        raise GateFailed(f"{gguf} and {onnx} disagree with each other", why=why)
    return {
        "pair": [gguf, onnx],
        "kl_nats": kl,
        "median_kl_nats": median,
        "top1_agreement": float(agreement(gguf_SV, onnx_SV).mean()),
        "kl_to_student_nats": own,
        "limit_kl_nats": limit,
        "limit_median_kl_nats": median_limit,
        "n_tokens": len(kl_S),
        "passed": True,
    }
