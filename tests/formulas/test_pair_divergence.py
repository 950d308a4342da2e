"""Every divergence against its definition in float64, its limits, and its gradient where the teacher gives no mass."""

import pytest
import torch
from torch import Tensor

from moe_edge.formulas.divergence import LOG_NOTHING
from moe_edge.formulas.pair_divergence import divergences, jsd, reverse_kl, skew_kl, total_variation

BETA, SKEW = 0.3, 0.1
NAMES = sorted(divergences(BETA, SKEW))


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def by_definition(name: str, p: Tensor, q: Tensor) -> Tensor:
    mixed = BETA * p + (1 - BETA) * q
    return {
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: BETA * kl(p, mixed) + (1 - BETA) * kl(q, mixed),
        "skew_kl": lambda: kl(p, SKEW * p + (1 - SKEW) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - SKEW) * p + SKEW * q),
        "tvd": lambda: 0.5 * (p - q).abs().sum(-1),
    }[name]()


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 7, 12, dtype=torch.float64, generator=generator) * 3
    return teacher, student.requires_grad_(True)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_the_definition(name: str, logits: tuple[Tensor, Tensor]) -> None:
    teacher, student = logits
    divergence = divergences(BETA, SKEW)[name]
    ours = divergence(teacher.log_softmax(-1), student.log_softmax(-1))
    expected = by_definition(name, teacher.softmax(-1), student.softmax(-1))
    torch.testing.assert_close(ours, expected)
    (slope,) = torch.autograd.grad(ours.sum(), student, retain_graph=True)
    (reference,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(slope, reference)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_where_student_is_teacher(name: str, logits: tuple[Tensor, Tensor]) -> None:
    p = logits[0].float().log_softmax(-1)
    q = p.clone().requires_grad_(True)
    value = divergences(BETA, SKEW)[name](p, q)
    assert float(value.abs().max()) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_place_of_the_teacher_costs_finitely(name: str) -> None:
    p = torch.tensor([[0.0, LOG_NOTHING]])
    student = torch.tensor([[0.0, 0.0]], requires_grad=True)
    value = divergences(BETA, SKEW)[name](p, student.log_softmax(-1))
    value.sum().backward()
    assert torch.isfinite(value).all() and float(value.detach()) > 0
    assert torch.isfinite(student.grad).all() and student.grad[0, 0] < 0 < student.grad[0, 1]


def test_directions_and_bounds(logits: tuple[Tensor, Tensor]) -> None:
    p, q = (x.log_softmax(-1) for x in logits)
    assert (total_variation(p, q) <= 1).all()
    torch.testing.assert_close(reverse_kl(p, q), kl(q.exp(), p.exp()))
    assert (jsd(p, q) <= torch.log(torch.tensor(2.0, dtype=torch.float64))).all()
    torch.testing.assert_close(jsd(p, q), jsd(q, p))  # symmetric at one half
    assert (skew_kl(p, q, 0.1) < kl(p.exp(), q.exp())).all()  # part of the teacher in the mixture
