"""Saliency: every criterion against a case of four experts worked out by hand."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from moe_edge.formulas import saliency


def _row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


@dataclass(frozen=True)
class Sums:
    """One layer, four experts; expert 3 never saw a token.

    Expert 0: tokens with ||f|| 1, 3 and gates .5, .5.  Expert 1: one token, ||f|| 5, gate .2.
    Expert 2: norms 2, 2, 2 and gates .1.
    """

    counts_LE: Tensor = field(default_factory=lambda: torch.tensor([[2, 1, 3, 0]]))
    gate_sum_LE: Tensor = field(default_factory=lambda: _row(1.0, 0.2, 0.3, 0.0))
    norm_sum_LE: Tensor = field(default_factory=lambda: _row(4.0, 5.0, 6.0, 0.0))
    norm_sq_sum_LE: Tensor = field(default_factory=lambda: _row(10.0, 25.0, 12.0, 0.0))
    gated_norm_sum_LE: Tensor = field(default_factory=lambda: _row(2.0, 1.0, 0.6, 0.0))
    hsic_LEE: Tensor = field(default_factory=lambda: torch.eye(4, dtype=torch.float64)[None])
    gated_hsic_LEE: Tensor = field(default_factory=lambda: torch.eye(4, dtype=torch.float64)[None])


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (saliency.frequency, [2, 1, 3, 0]),
        (saliency.gate_mass, [1.0, 0.2, 0.3, 0]),
        (saliency.ean, [4, 5, 6, 0]),
        (saliency.man, [2, 5, 2, 0]),
        (saliency.msan, [5, 25, 4, 0]),
        (saliency.reap, [1.0, 1.0, 0.2, 0]),
    ],
)
def test_scores_match_the_hand_computed_case(score, expected):
    result = score(Sums())
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, _row(*expected))


def test_an_expert_without_tokens_scores_the_lowest_value_and_never_nan():
    for score in (saliency.man, saliency.msan, saliency.reap):
        values = score(Sums())
        assert torch.isfinite(values).all() and values[0, 3] == 0 == values.min()
