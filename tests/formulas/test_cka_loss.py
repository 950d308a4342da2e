"""The differentiable pair CKA: equal to the profiling formula, debiased, scale-free, without NaN."""

import pytest
import torch

from moe_edge.formulas.cka import cka_from_hsic, hsic_all_pairs, normalise_rows
from moe_edge.formulas.cka_loss import cka_pair, hsic_triple, kept_tokens, mean_pairwise_cka


def test_equals_the_all_pairs_formula() -> None:
    x, y = torch.randn(64, 20), torch.randn(64, 20)
    y = y + 0.5 * x
    expected = cka_from_hsic(hsic_all_pairs(normalise_rows(torch.stack([x, y]))))
    assert float(cka_pair(x, y)) == pytest.approx(float(expected[0, 1]), abs=1e-4)


def test_equal_up_to_rotation_is_one_and_unrelated_is_zero() -> None:
    x = torch.randn(256, 300)
    rotation, _ = torch.linalg.qr(torch.randn(300, 300))
    assert float(cka_pair(x, 7 * x @ rotation)) == pytest.approx(1.0, abs=1e-4)
    assert abs(float(cka_pair(x, torch.randn(256, 120)))) < 0.1


def test_gradient_lowers_the_distance_and_ignores_scale() -> None:
    x, y = torch.randn(48, 8, dtype=torch.float64), torch.randn(48, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: cka_pair(z, y), (x.requires_grad_(),), eps=1e-6, atol=1e-6)
    value = cka_pair(x, y)
    (slope,) = torch.autograd.grad(value, x)
    x, value = x.detach(), float(value.detach())
    assert float(cka_pair(x + 0.1 * slope / slope.norm() * x.norm(), y)) > value
    assert float(cka_pair(100 * x, y)) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("constant", (torch.zeros(32, 8), torch.ones(32, 8)))
def test_a_constant_student_gives_no_nan(constant: torch.Tensor) -> None:
    student = constant.clone().requires_grad_()
    value = cka_pair(student, torch.randn(32, 8))
    (slope,) = torch.autograd.grad(value, student)
    assert abs(float(value.detach())) < 0.05 and slope.isfinite().all()


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        hsic_triple(torch.randn(3, 4), torch.randn(3, 4))
    with pytest.raises(ValueError, match="same tokens"):
        hsic_triple(torch.randn(8, 4), torch.randn(9, 4))


def test_sinks_and_the_first_position_are_dropped() -> None:
    hidden = torch.randn(20, 6)
    hidden[7] *= 1000
    kept = kept_tokens(hidden).tolist()
    assert 0 not in kept and 7 not in kept and len(kept) == 18


def test_padding_counts_for_nothing() -> None:
    hidden = torch.randn(20, 6)
    hidden[12:] *= 1e6
    valid = torch.arange(20) < 12
    assert kept_tokens(hidden, valid).tolist() == list(range(1, 12))


def test_leading_axes_are_pairs_of_their_own() -> None:
    x, y = torch.randn(3, 24, 8), torch.randn(3, 24, 5)
    expected = torch.stack([cka_pair(a, b) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(cka_pair(x, y), expected)


def test_the_mean_of_all_pairs() -> None:
    experts = torch.randn(4, 32, 6, dtype=torch.float64)
    experts[1] += experts[0]
    slow = [cka_pair(experts[i], experts[j]) for i in range(4) for j in range(4) if i != j]
    torch.testing.assert_close(mean_pairwise_cka(experts), torch.stack(slow).mean())
    assert torch.autograd.gradcheck(mean_pairwise_cka, (experts[:, :8].requires_grad_(),), eps=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="2 experts"):
        mean_pairwise_cka(experts[:1])
