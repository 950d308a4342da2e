"""Scaled rotary embeddings: which parameters a type has, Llama 3's frequencies, and what a runtime that rounds YaRN gets wrong.

Llama 3.1 divides the frequency of a column whose wavelength exceeds the original context by the factor, keeps that of a
short one, and blends in between (transformers' `_compute_llama3_parameters`; llama.cpp takes the divisors as a tensor).

YaRN (https://arxiv.org/abs/2309.00071) does it over a range of columns: below it a column of q and k keeps its frequency,
above it the frequency is divided by the factor, between them it moves linearly. transformers rounds the ends to whole columns
unless `truncate` is false (gpt-oss); ggml always does (ggml_rope_yarn_corr_dims). Real gpt-oss checkpoints: 8.1..17.4 becomes
8..18, an error of 2.2e-4 rad per token (measured on a small random model with these values: median KL 9e-6 nats over 150
tokens, 9e-5 over 1500).
"""

import math
from collections.abc import Mapping
from typing import Any

MAX_RAD_PER_TOKEN = 1e-3
# rope_type -> the parameters without which it is not defined
PARAMETERS: dict[str, frozenset[str]] = {
    "yarn": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


def is_defined(rope: Mapping[str, Any]) -> bool:
    """Are all parameters of a known type there, as positive numbers that do not contradict one another?"""
    needed = PARAMETERS.get(rope["rope_type"])
    if needed is None or not all(_positive(rope.get(name)) for name in needed):
        return False
    return rope["rope_type"] != "llama3" or bool(rope["low_freq_factor"] < rope["high_freq_factor"])


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def llama3_divisors(rope: Mapping[str, Any], head_dim: int, theta: float) -> list[float]:
    """By how much Llama 3.1 divides each column's frequency, `head_dim / 2` numbers from 1 to the factor.

    Args:
        rope: of type llama3, with all its parameters.
        head_dim: columns of a head that rotate.
    """
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    found = []
    for column in range(head_dim // 2):
        turns = context * theta ** (-2 * column / head_dim) / (2 * math.pi)  # within the original context
        if turns > high:
            found.append(1.0)
        elif turns < low:
            found.append(float(factor))
        else:
            kept = (turns - low) / (high - low)
            found.append(1 / ((1 - kept) / factor + kept))
    return found


def rounding_error(rope: Mapping[str, Any], head_dim: int, theta: float) -> float:
    """Largest error of a column's frequency, rad per token, when the range is rounded outwards to whole columns."""
    if rope.get("truncate", True):
        return 0.0
    low, high = (
        _column(rotations, rope["original_max_position_embeddings"], head_dim, theta)
        for rotations in (rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0)
    )
    exact = _frequencies(max(low, 0), min(high, head_dim - 1), rope["factor"], head_dim, theta)
    rounded = _frequencies(max(math.floor(low), 0), min(math.ceil(high), head_dim - 1), rope["factor"], head_dim, theta)
    return max(abs(a - b) for a, b in zip(exact, rounded, strict=True))


def _column(rotations: float, context: int, head_dim: int, theta: float) -> float:
    """The column that turns this often within the original context."""
    return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def _frequencies(low: float, high: float, factor: float, head_dim: int, theta: float) -> list[float]:
    found = []
    for column in range(head_dim // 2):
        scaled = min(max((column - low) / max(high - low, 1e-3), 0.0), 1.0)
        found.append(theta ** (-2 * column / head_dim) * (1 - scaled + scaled / factor))
    return found
