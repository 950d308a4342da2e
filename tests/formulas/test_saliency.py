"""Saliency: every criterion against a case of four experts worked out by hand; super experts are few and loud."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moe_edge.formulas import saliency
from moe_edge.formulas.saliency import super_experts


def _row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


@dataclass(frozen=True)
class Sums:
    """One layer, four experts, six tokens; expert 3 never saw one.

    Expert 0: tokens with ||f|| 1, 3 and gates .5, .5.  Expert 1: one token, ||f|| 5, gate .2.
    Expert 2: norms 2, 2, 2 and gates .1. Of the evidence tokens one had chosen 0 (error 6), two had chosen 2 (error 3 in
    all), none the others.
    """

    counts_LE: Tensor = field(default_factory=lambda: torch.tensor([[2, 1, 3, 0]]))
    gate_sum_LE: Tensor = field(default_factory=lambda: _row(1.0, 0.2, 0.3, 0.0))
    norm_sum_LE: Tensor = field(default_factory=lambda: _row(4.0, 5.0, 6.0, 0.0))
    norm_sq_sum_LE: Tensor = field(default_factory=lambda: _row(10.0, 25.0, 12.0, 0.0))
    gated_norm_sum_LE: Tensor = field(default_factory=lambda: _row(2.0, 1.0, 0.6, 0.0))
    hsic_LEE: Tensor = field(default_factory=lambda: torch.eye(4, dtype=torch.float64)[None])
    gated_hsic_LEE: Tensor = field(default_factory=lambda: torch.eye(4, dtype=torch.float64)[None])
    loo_sq_sum_LE: Tensor = field(default_factory=lambda: _row(6.0, 0.0, 3.0, 0.0))
    loo_counts_LE: Tensor = field(default_factory=lambda: torch.tensor([[1, 0, 2, 0]]))
    weight_mean_abs_LE: Tensor = field(default_factory=lambda: _row(0.4, 0.5, 0.25, 0.0))
    weight_rms_LE: Tensor = field(default_factory=lambda: _row(0.5, 0.55, 0.5, 0.0))
    tokens: int = 6


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (saliency.frequency, [2, 1, 3, 0]),
        (saliency.gate_mass, [1.0, 0.2, 0.3, 0]),
        (saliency.ean, [4, 5, 6, 0]),
        (saliency.gated_ean, [2, 1, 0.6, 0]),
        (saliency.man, [2, 5, 2, 0]),
        (saliency.msan, [5, 25, 4, 0]),
        (saliency.reap, [1.0, 1.0, 0.2, 0]),
        (saliency.loo_mse, [6 * 2 / 6, 0, 1.5 * 3 / 6, 0]),
        (saliency.aimer, [1.25, 1.1, 2.0, 0]),
    ],
)
def test_scores_match_the_hand_computed_case(score, expected):
    result = score(Sums())
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, _row(*expected))


def test_an_expert_without_tokens_scores_the_lowest_value_and_never_nan():
    for score in (saliency.man, saliency.msan, saliency.reap, saliency.loo_mse):
        values = score(Sums())
        assert torch.isfinite(values).all() and values[0, 3] == 0 == values.min()


def test_aimer_prefers_heavy_tails_whatever_their_scale():
    """A Gaussian's mean|W| / RMS is sqrt(2 / pi); heavier tails have less, so they score higher and stay."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(20_000, generator=generator)
    heavy = 7 * plain**3
    stats = Sums(
        weight_mean_abs_LE=torch.stack([w.abs().mean() for w in (plain, heavy)])[None],
        weight_rms_LE=torch.stack([w.square().mean().sqrt() for w in (plain, heavy)])[None],
    )
    gaussian, tailed = saliency.aimer(stats)[0].tolist()
    assert gaussian == pytest.approx((torch.pi / 2) ** 0.5, rel=0.01) and tailed > 1.5 * gaussian


def _found(norm_max_LE: torch.Tensor) -> list[list[int]]:
    return super_experts(SimpleNamespace(norm_max_LE=norm_max_LE)).nonzero().tolist()


def test_planted_super_experts_are_found() -> None:
    norms = torch.rand(8, 128, generator=torch.Generator().manual_seed(0)) + 1
    norms[1, 68], norms[2, 92], norms[3, 82] = 900.0, 600.0, 300.0
    assert _found(norms) == [[1, 68], [2, 92], [3, 82]]


def test_loud_is_relative_to_the_loudest() -> None:
    norms = torch.rand(8, 128, generator=torch.Generator().manual_seed(0)) + 1
    norms[1, 68], norms[2, 92] = 900.0, 80.0
    assert _found(norms) == [[1, 68]]


def test_a_small_model_has_one_at_most() -> None:
    assert _found(torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.5, 1.0, 1.0, 0.0]])) == [[1, 0]]
    assert _found(torch.zeros(2, 4)) == [] and _found(torch.ones(2, 4)) == []
