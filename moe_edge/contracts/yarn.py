"""YaRN's range of columns (https://arxiv.org/abs/2309.00071), and what a runtime that rounds it gets wrong.

Below the range a column of q and k keeps its frequency, above it the frequency is divided by the factor, between them it
moves linearly. transformers rounds the ends to whole columns unless `truncate` is false (gpt-oss); ggml always does
(ggml_rope_yarn_corr_dims). Real gpt-oss checkpoints: 8.1..17.4 becomes 8..18, an error of 2.2e-4 rad per token (measured on
a small random model with these values: median KL 9e-6 nats over 150 tokens, 9e-5 over 1500).
"""

import math
from collections.abc import Mapping
from typing import Any

MAX_RAD_PER_TOKEN = 1e-3


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
