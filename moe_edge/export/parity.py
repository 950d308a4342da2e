"""Parity: an exported file is reopened in its own runtime and compared with the Hugging Face student before it counts.

Full-precision exports must reproduce the student up to the runtime's arithmetic. A MoE is not continuous: where two experts
tie, a rounding error flips a token's routing honestly. Two rules judge:

- number by number, over the tokens whose routers are all further than NEAR_TIE_GAP from a tie, while these are nearly all
  tokens. A flipped token reaches the later ones through attention (on a 30-layer model with 3 % clear tokens even those
  differ by .1 in F16), so with fewer clear tokens this rule is left out, and the row says so;
- always: the median KL over tokens, which flips hardly move and a wrong conversion moves by orders of magnitude, beside a
  wider limit on the mean.

Quantized files are not limited here (the target's gates do that), but their numbers stand in the same table.
V vocabulary, S tokens.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from moe_edge.contracts.errors import GateFailed
from moe_edge.families.chat_template import render_chat
from moe_edge.metrics.quality import CHUNK_ELEMENTS, log_softmax
from moe_edge.runtimes.base import Runtime, generate

NEAR_TIE_LOGITS = 0.05  # the student's best two logits closer than this: either token is a faithful continuation
NEAR_TIE_GAP = 1e-3  # router gap (families/routing_gap.py) below which a runtime may choose another expert
CLEAR_SHARE = 0.9  # of the tokens that must be clear of ties for the rule on single logits
GREEDY_TOKENS = 16
TEXT = (
    "The lighthouse keeper counted the ships every evening and wrote their names in a long blue book. On the third of May, "
    '12 of them came back; the other 7 had sailed north, where the herring were. "Will they return?" asked his daughter. '
    "He did not know. In Zürich and in São Paulo people read about it in the newspaper, and a professor of mathematics "
    "computed the odds: 0.35, or 1 in 3. What should a captain do when the wind turns? First, reef the sails. Second, "
    "keep the bow to the waves. Third, wait for the morning. def steer(angle): return angle * 0.5  # half of what you think"
)
PROMPT = "What is the capital of France?"


class Student(Runtime, Protocol):
    """The Hugging Face student, which can also tell how close its routers come to a tie."""

    def routing_gaps(self, ids_S: np.ndarray) -> np.ndarray:
        """Smallest gap of each token, [S]."""
        ...


@dataclass(frozen=True)
class Limits:
    """Largest differences that count as the same model; None = not limited."""

    median_kl_nats: float
    kl_nats: float
    greedy: bool = False  # must the first greedy tokens agree, up to a near-tie
    clear_max_abs_logit: float | None = None  # these three: over tokens clear of ties, where they are nearly all
    clear_p99_abs_logit: float | None = None
    clear_kl_nats: float | None = None


# fp32 graphs differ by summation order only. llama.cpp rounds activations to fp16 (11 bits) inside F16 products: measured on a
# 135 M parameter Qwen2-MoE with 30 layers, median KL 3e-5, mean 6e-4 (routing flips); on a 14 M one with 4 layers 5e-8, 8e-8,
# 99th percentile of single logits 1.4e-3 (fp32 graph: largest 2e-5).
LIMITS = {
    "gguf F16": Limits(median_kl_nats=1e-3, kl_nats=1e-2, clear_p99_abs_logit=5e-3, clear_kl_nats=1e-3),
    "onnx fp32": Limits(median_kl_nats=1e-6, kl_nats=1e-4, greedy=True, clear_max_abs_logit=1e-4),
}


@dataclass(frozen=True)
class Reference:
    """What the Hugging Face student says on the fixed text and prompt."""

    ids_S: np.ndarray
    logits_SV: np.ndarray
    gap_S: np.ndarray  # the routers' smallest gap of each token
    prompt_ids: list[int]
    greedy: list[int]
    margins: list[float]  # best minus second-best logit at each greedy position

    @property
    def clear_S(self) -> np.ndarray:
        """Which tokens no rounding error can route otherwise."""
        clear: np.ndarray = self.gap_S > NEAR_TIE_GAP
        return clear


@dataclass(frozen=True)
class Parity:
    """One artifact against the student, on the same tokens; `clear` = clear of router ties, None where no token is."""

    max_abs_logit: float
    p99_abs_logit: float
    p99_relative: float
    kl_nats: float
    median_kl_nats: float
    top1_agreement: float
    perplexity: float  # of the next token of the fixed text
    student_perplexity: float
    greedy_equal: int  # leading greedy tokens that agree, of those compared
    greedy_compared: int  # up to the student's first near-tie
    n_tokens: int
    clear_tokens: int
    clear_max_abs_logit: float | None
    clear_p99_abs_logit: float | None
    clear_kl_nats: float | None


def prompt_ids(tokenizer: Any) -> list[int]:
    """The fixed question as the model's chat, or as plain text where there is no template.

    Raises:
        InputRejected: the tokenizer's chat template is broken or hostile.
    """
    if getattr(tokenizer, "chat_template", None):
        text = render_chat(tokenizer, [{"role": "user", "content": PROMPT}], add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(PROMPT)["input_ids"])


def reference(student: Student, tokenizer: Any, max_tokens: int) -> Reference:
    """Run the student over the fixed text and once greedily."""
    ids_S = np.asarray(tokenizer(TEXT)["input_ids"][:max_tokens], dtype=np.int64)
    prompt = prompt_ids(tokenizer)[-max_tokens:]
    logits_V, greedy, margins = student.prefill(np.asarray(prompt)), [], []
    for _ in range(GREEDY_TOKENS):
        second, best = np.partition(logits_V, -2)[-2:]
        greedy.append(int(logits_V.argmax()))
        margins.append(float(best - second))
        logits_V = student.step(greedy[-1])
    return Reference(ids_S, student.logits(ids_S), student.routing_gaps(ids_S), prompt, greedy, margins)


def kl_of(p_SV: np.ndarray, q_SV: np.ndarray) -> np.ndarray:
    """KL(softmax(p) || softmax(q)) of every row of logits, [S] float64 nats, a few rows at a time."""
    step = max(1, CHUNK_ELEMENTS // p_SV.shape[1])
    parts = []
    for start in range(0, len(p_SV), step):
        p, q = log_softmax(p_SV[start : start + step]), log_softmax(q_SV[start : start + step])
        parts.append((np.exp(p) * (p - q)).sum(-1))
    return np.concatenate(parts)


def perplexity(logits_SV: np.ndarray, ids_S: np.ndarray) -> float:
    """exp of the mean negative log-likelihood of every next token."""
    step, total = max(1, CHUNK_ELEMENTS // logits_SV.shape[1]), 0.0
    for start in range(0, len(ids_S) - 1, step):
        stop = min(start + step, len(ids_S) - 1)
        chosen = np.take_along_axis(log_softmax(logits_SV[start:stop]), ids_S[start + 1 : stop + 1, None], -1)
        total -= float(chosen.sum())
    return math.exp(min(total / (len(ids_S) - 1), 700.0))


def compare(expected: Reference, artifact: Runtime, logits_SV: np.ndarray | None = None) -> Parity:
    """An open artifact against the student's reference; `logits_SV` are its own where they are known already."""
    if logits_SV is None:
        logits_SV = artifact.logits(expected.ids_S)
    difference_SV = np.abs(logits_SV - expected.logits_SV)
    kl_S, clear_S = kl_of(expected.logits_SV, logits_SV), expected.clear_S
    p99 = float(np.quantile(difference_SV, 0.99))
    equal, compared = _greedy(expected, artifact)
    some = bool(clear_S.any())
    return Parity(
        max_abs_logit=float(difference_SV.max()), p99_abs_logit=p99,
        p99_relative=p99 / float(np.abs(expected.logits_SV).max()),
        kl_nats=float(kl_S.mean()), median_kl_nats=float(np.median(kl_S)),
        top1_agreement=float((logits_SV.argmax(-1) == expected.logits_SV.argmax(-1)).mean()),
        perplexity=perplexity(logits_SV, expected.ids_S),
        student_perplexity=perplexity(expected.logits_SV, expected.ids_S),
        greedy_equal=equal, greedy_compared=compared, n_tokens=len(expected.ids_S), clear_tokens=int(clear_S.sum()),
        clear_max_abs_logit=float(difference_SV[clear_S].max()) if some else None,
        clear_p99_abs_logit=float(np.quantile(difference_SV[clear_S], 0.99)) if some else None,
        clear_kl_nats=float(kl_S[clear_S].mean()) if some else None,
    )  # fmt: skip


def _greedy(expected: Reference, artifact: Runtime) -> tuple[int, int]:
    """Leading greedy tokens that agree, and how many were compared (up to the student's first near-tie)."""
    tokens = generate(artifact, np.asarray(expected.prompt_ids), GREEDY_TOKENS)
    compared = next((i for i, margin in enumerate(expected.margins) if margin < NEAR_TIE_LOGITS), GREEDY_TOKENS)
    pairs = zip(tokens, expected.greedy, strict=False)
    equal = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(tokens), GREEDY_TOKENS))
    return min(equal, compared), compared


def require(kind: str, parity: Parity) -> dict[str, Any]:
    """The parity as a report row; a full-precision export beyond its limits is refused.

    Raises:
        GateFailed: the file does not compute the student's function.
    """
    limits = LIMITS.get(kind.removesuffix(" delivered"))
    row: dict[str, Any] = {"artifact": kind, **asdict(parity)}
    if limits is None:
        return row | {"limits": None, "passed": None, "rule": None}
    clear = parity.clear_tokens >= CLEAR_SHARE * parity.n_tokens
    faults = [*_beyond(parity, limits, ("median_kl_nats", "kl_nats"))]
    if clear:
        faults += _beyond(parity, limits, ("clear_max_abs_logit", "clear_p99_abs_logit", "clear_kl_nats"))
    if limits.greedy and parity.greedy_equal < parity.greedy_compared:
        faults.append(f"greedy tokens differ at {parity.greedy_equal} of {parity.greedy_compared}")
    if faults:
        raise GateFailed(f"the {kind} export does not reproduce the student", why="; ".join(faults))
    return row | {"limits": asdict(limits), "passed": True, "rule": "logits and KL" if clear else "KL"}


_WORDS = {
    "median_kl_nats": ("median KL", "nats"),
    "kl_nats": ("mean KL", "nats"),
    "clear_max_abs_logit": ("largest logit difference of tokens clear of ties", ""),
    "clear_p99_abs_logit": ("99th percentile of logit differences of tokens clear of ties", ""),
    "clear_kl_nats": ("mean KL of tokens clear of ties", "nats"),
}


def _beyond(parity: Parity, limits: Limits, names: tuple[str, ...]) -> list[str]:
    found = []
    for name in names:
        value, limit = getattr(parity, name), getattr(limits, name)
        if limit is not None and not value <= limit:  # a NaN is beyond every limit
            what, unit = _WORDS[name]
            found.append(f"{what} is {value:.2e} > {limit:.0e} {unit}".rstrip())
    return found
