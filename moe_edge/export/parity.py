"""Parity: an exported file is reopened in its own runtime and compared with the Hugging Face student before it counts.

Full-precision exports must reproduce the student up to the runtime's arithmetic. A MoE is not continuous: where two experts
tie, a rounding error flips a token's routing honestly, and in a deep model every token meets such a tie somewhere. So the
judge is the median over tokens, which flips hardly move and a wrong conversion moves by orders of magnitude, beside a wider
limit on the mean. V vocabulary, S tokens.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe_edge.contracts.errors import GateFailed
from moe_edge.runtimes.base import Runtime, generate

NEAR_TIE_LOGITS = 0.05  # the student's best two logits closer than this: either token is a faithful continuation
GREEDY_TOKENS = 16
TEXT = (
    "The lighthouse keeper counted the ships every evening and wrote their names in a long blue book. On the third of May, "
    '12 of them came back; the other 7 had sailed north, where the herring were. "Will they return?" asked his daughter. '
    "He did not know. In Zürich and in São Paulo people read about it in the newspaper, and a professor of mathematics "
    "computed the odds: 0.35, or 1 in 3. What should a captain do when the wind turns? First, reef the sails. Second, "
    "keep the bow to the waves. Third, wait for the morning. def steer(angle): return angle * 0.5  # half of what you think"
)
PROMPT = "What is the capital of France?"


@dataclass(frozen=True)
class Limits:
    """Largest differences that count as the same model."""

    median_kl_nats: float
    kl_nats: float
    greedy: bool  # must the first greedy tokens agree, up to a near-tie


# fp32 graphs differ by summation order only. llama.cpp rounds activations to fp16 (11 bits) inside F16 products: measured on a
# 135 M parameter Qwen2-MoE with 30 layers, median 3e-4, mean 2e-3 (routing flips), on a 14 M one with 4 layers 7e-6.
LIMITS = {
    "gguf F16": Limits(median_kl_nats=1e-3, kl_nats=1e-2, greedy=False),
    "onnx fp32": Limits(median_kl_nats=1e-6, kl_nats=1e-4, greedy=True),
}


@dataclass(frozen=True)
class Reference:
    """What the Hugging Face student says on the fixed text and prompt."""

    ids_S: np.ndarray
    logits_SV: np.ndarray
    prompt_ids: list[int]
    greedy: list[int]
    margins: list[float]  # best minus second-best logit at each greedy position


@dataclass(frozen=True)
class Parity:
    """One artifact against the student, on the same tokens."""

    max_abs_logit: float
    p99_abs_logit: float
    p99_relative: float
    kl_nats: float
    median_kl_nats: float
    top1_agreement: float
    greedy_equal: int  # leading greedy tokens that agree, of those compared
    greedy_compared: int  # up to the student's first near-tie
    n_tokens: int


def prompt_ids(tokenizer: Any) -> list[int]:
    """The fixed question as the model's chat, or as plain text where there is no template."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(PROMPT)["input_ids"])


def reference(student: Runtime, tokenizer: Any, max_tokens: int) -> Reference:
    """Run the student once over the fixed text and once greedily."""
    ids_S = np.asarray(tokenizer(TEXT)["input_ids"][:max_tokens], dtype=np.int64)
    prompt = prompt_ids(tokenizer)[-max_tokens:]
    logits_V, greedy, margins = student.prefill(np.asarray(prompt)), [], []
    for _ in range(GREEDY_TOKENS):
        second, best = np.partition(logits_V, -2)[-2:]
        greedy.append(int(logits_V.argmax()))
        margins.append(float(best - second))
        logits_V = student.step(greedy[-1])
    return Reference(ids_S, student.logits(ids_S), prompt, greedy, margins)


def log_softmax(logits_SV: np.ndarray) -> np.ndarray:
    """Row-wise log-softmax in float64."""
    shifted_SV = logits_SV.astype(np.float64) - logits_SV.max(-1, keepdims=True)
    return shifted_SV - np.log(np.exp(shifted_SV).sum(-1, keepdims=True))


def compare(expected: Reference, artifact: Runtime) -> Parity:
    """Open artifact against the student's reference."""
    logits_SV = artifact.logits(expected.ids_S)
    difference_SV = np.abs(logits_SV - expected.logits_SV)
    p_SV, q_SV = log_softmax(expected.logits_SV), log_softmax(logits_SV)
    kl_S = (np.exp(p_SV) * (p_SV - q_SV)).sum(-1)
    p99 = float(np.quantile(difference_SV, 0.99))
    tokens = generate(artifact, np.asarray(expected.prompt_ids), GREEDY_TOKENS)
    compared = next((i for i, margin in enumerate(expected.margins) if margin < NEAR_TIE_LOGITS), GREEDY_TOKENS)
    pairs = zip(tokens, expected.greedy, strict=False)
    equal = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(tokens), GREEDY_TOKENS))
    return Parity(
        max_abs_logit=float(difference_SV.max()), p99_abs_logit=p99,
        p99_relative=p99 / float(np.abs(expected.logits_SV).max()),
        kl_nats=float(kl_S.mean()), median_kl_nats=float(np.median(kl_S)),
        top1_agreement=float((logits_SV.argmax(-1) == expected.logits_SV.argmax(-1)).mean()),
        greedy_equal=min(equal, compared), greedy_compared=compared, n_tokens=len(expected.ids_S),
    )  # fmt: skip


def require(kind: str, parity: Parity) -> dict[str, Any]:
    """The parity as a report row; a full-precision export beyond its limits is refused.

    Raises:
        GateFailed: the file does not compute the student's function.
    """
    limits = LIMITS.get(kind)
    row: dict[str, Any] = {"artifact": kind, **asdict(parity)}
    if limits is None:
        return row | {"limits": None, "passed": None}
    faults = []
    if not parity.median_kl_nats <= limits.median_kl_nats:
        faults.append(f"median KL is {parity.median_kl_nats:.2e} > {limits.median_kl_nats:.0e} nats")
    if not parity.kl_nats <= limits.kl_nats:
        faults.append(f"mean KL is {parity.kl_nats:.2e} > {limits.kl_nats:.0e} nats")
    if limits.greedy and parity.greedy_equal < parity.greedy_compared:
        faults.append(f"greedy tokens differ at {parity.greedy_equal} of {parity.greedy_compared}")
    if faults:
        raise GateFailed(f"the {kind} export does not reproduce the student", why="; ".join(faults))
    return row | {"limits": asdict(limits), "passed": True}
