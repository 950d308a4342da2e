"""Pairs of log-probabilities: they sum to one, give the KLs, and their gradients are those of a slow float64 reference."""

import pytest
import torch
from torch import Tensor

from moe_edge.formulas.divergence import (
    LOG_NOTHING,
    cached_kl,
    coarse_pair,
    dense_pair,
    forward_kl,
    kl_dense,
    teacher_topk,
)
from moe_edge.formulas.logit_views import WholeLogits
from tests.formulas.test_divergence import TEMPERATURES, logits_pair


def kept(teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    top = teacher_topk(teacher, k, TEMPERATURES)
    return top.indices_TK, top.logprobs_TK, top.tail_logmass_TH[:, TEMPERATURES.index(temperature)]


def slow_coarse(logits_TV: Tensor, indices_TK: Tensor, temperature: float) -> Tensor:
    """Kept probabilities and the rest, token by token from the whole softmax in float64."""
    rows = []
    for logits_V, ids_K in zip(logits_TV, indices_TK, strict=True):
        p_V = torch.softmax(logits_V / temperature, -1)
        off = torch.ones(len(p_V), dtype=torch.bool)
        off[ids_K] = False
        rows.append(torch.cat([p_V[ids_K], p_V[off].sum()[None]]).log())
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", (1, 16, 399))
def test_a_coarse_pair_sums_to_one_and_is_the_cached_kl(k: int, temperature: float) -> None:
    teacher, student = logits_pair()
    pair = coarse_pair(WholeLogits(student), *kept(teacher, k, temperature), temperature)
    for side in pair:
        assert side.shape == (len(teacher), k + 1)
        torch.testing.assert_close(side.exp().sum(-1), torch.ones(len(teacher)), rtol=1e-5, atol=1e-6)
    indices = kept(teacher, k, temperature)[0]
    torch.testing.assert_close(
        pair[0].double(), slow_coarse(teacher.double(), indices, temperature), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        pair[1].double(), slow_coarse(student.double(), indices, temperature), rtol=1e-3, atol=1e-4
    )
    ours = cached_kl(WholeLogits(student), *kept(teacher, k, temperature), temperature)
    assert torch.equal(forward_kl(*pair), ours)


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_a_dense_pair_is_the_dense_kl(temperature: float) -> None:
    teacher, student = logits_pair()
    padded = torch.cat([teacher, torch.full((len(teacher), 8), 30.0)], -1)
    pair = dense_pair(padded, student, temperature)
    for side in pair:
        torch.testing.assert_close(side.exp().sum(-1), torch.ones(len(teacher)), rtol=1e-5, atol=1e-6)
    assert torch.equal(forward_kl(*pair), kl_dense(teacher, student, temperature))
    assert dense_pair(padded, padded, temperature, 400)[0].shape == (len(teacher), 400)


@pytest.mark.parametrize("form", ("forward", "reverse"))
@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_gradients_in_float64_equal_the_slow_reference(form: str, temperature: float) -> None:
    teacher, student = (logits.double() for logits in logits_pair(tokens=5, vocab=60))

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum() if form == "forward" else (q.exp() * (q - p)).sum()

    indices, logprobs, tail = (column for column in kept(teacher, 8, temperature))
    exact = slow_coarse(teacher, indices, temperature)
    logprobs = torch.log_softmax(teacher, -1).gather(-1, indices)
    slopes = []
    for pair_of in (
        lambda logits: coarse_pair(WholeLogits(logits), indices, logprobs, exact[:, -1], temperature),
        lambda logits: (exact, slow_coarse(logits, indices, temperature)),
        lambda logits: dense_pair(teacher, logits, temperature),
        lambda logits: tuple(torch.log(torch.softmax(x / temperature, -1)) for x in (teacher, logits)),
    ):
        leaf = student.clone().requires_grad_()
        slopes.append(torch.autograd.grad(divergence(*pair_of(leaf)), leaf)[0])
    assert slopes[0].dtype == torch.float64
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slopes[2], slopes[3], rtol=1e-9, atol=1e-12)
    assert (slopes[0] - slopes[2]).norm() > 1e-3  # the two references are not the same thing


def test_all_ids_kept_leave_no_tail() -> None:
    teacher, student = logits_pair()
    pair = coarse_pair(WholeLogits(student), *kept(teacher, 400, 2.0), 2.0)
    assert pair[0].shape == pair[1].shape == teacher.shape
    torch.testing.assert_close(forward_kl(*pair), kl_dense(teacher, student, 2.0), rtol=1e-4, atol=1e-5)


def test_an_empty_tail_is_finite_in_every_direction() -> None:
    teacher, student = logits_pair()
    teacher[:, 0] = 1e4
    student.requires_grad_()
    indices, logprobs, tail = kept(teacher, 16, 1.0)
    for mass in (tail, torch.full_like(tail, -torch.inf)):
        p, q = coarse_pair(WholeLogits(student), indices, logprobs, mass, 1.0)
        assert bool((p[:, -1] >= LOG_NOTHING).all())
        both = (p.exp() * (p - q) + q.exp() * (q - p)).sum()
        assert both.isfinite() and torch.autograd.grad(both, student, retain_graph=True)[0].isfinite().all()


def test_a_tail_of_everything_is_finite() -> None:
    _, student = logits_pair()
    indices = torch.arange(4).expand(len(student), 4)
    p, q = coarse_pair(WholeLogits(student), indices, torch.zeros(len(student), 4), torch.zeros(len(student)), 1.0)
    assert p.isfinite().all() and q.isfinite().all()
    torch.testing.assert_close(p.exp().sum(-1), torch.ones(len(student)), rtol=1e-5, atol=1e-6)
