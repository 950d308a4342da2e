"""Random-sampling targets: what is drawn, that gradient and value are unbiased, and that draws repeat with their seed."""

import pytest
import torch

from moe_edge.formulas.divergence import kl_dense
from moe_edge.formulas.logit_views import WholeLogits
from moe_edge.formulas.sampling import draw, sampled_kl
from tests.formulas.test_divergence import logits_pair

DRAWS = 12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_the_mean_gradient_is_the_full_kls(temperature: float) -> None:
    teacher, student = logits_pair(tokens=1, vocab=30)
    leaf = student.double().requires_grad_()
    full = torch.autograd.grad(kl_dense(teacher.double(), leaf, temperature).sum(), leaf)[0]
    repeats = 4000
    top = draw(teacher.expand(repeats, -1), DRAWS, temperature, generator())
    loss_T = sampled_kl(WholeLogits(leaf.expand(repeats, -1)), *top, temperature)
    mean = torch.autograd.grad(loss_T.mean(), leaf)[0]
    p_V = torch.softmax(teacher[0].double() / temperature, -1)
    deviation_V = (p_V * (1 - p_V) / DRAWS / repeats).sqrt() / temperature
    assert ((mean - full).abs()[0] < 4.5 * deviation_V).all()
    first = sampled_kl(WholeLogits(leaf), *(column[:1] for column in top), temperature)
    one = torch.autograd.grad(first.sum(), leaf)[0]
    assert (one - full).norm() > 10 * (mean - full).norm()  # a single draw is noisy: the mean is what is unbiased


def test_the_mean_value_is_the_full_kl() -> None:
    teacher, student = logits_pair(tokens=4, vocab=50)
    repeats = 3000
    top = draw(teacher.repeat(repeats, 1), DRAWS, 1.0, generator(1))
    ours = sampled_kl(WholeLogits(student.repeat(repeats, 1)), *top).view(repeats, 4)
    error = ours.mean(0) - kl_dense(teacher, student)
    assert (error.abs() < 4.5 * ours.std(0) / repeats**0.5).all()


def test_counts_sum_to_the_draws_and_ids_are_unique() -> None:
    teacher, _ = logits_pair(tokens=200)
    top = draw(teacher, 50, 1.0, generator())
    assert (top.counts_TU.sum(-1) == 50).all() and top.indices_TU.shape[1] < 50
    for ids, counts in zip(top.indices_TU, top.counts_TU, strict=True):
        held = ids[counts > 0]
        assert len(held.unique()) == len(held)
    again = draw(teacher, 50, 1.0, generator())
    assert all(torch.equal(one, other) for one, other in zip(top, again, strict=True))
    p_TV = torch.softmax(teacher.double(), -1)
    torch.testing.assert_close(top.entropy_T.double(), -(p_TV * p_TV.log()).sum(-1), rtol=1e-4, atol=1e-5)


def test_padding_and_impossible_ids_are_never_drawn() -> None:
    teacher, _ = logits_pair(tokens=300, vocab=20)
    teacher[:, 15:] = -torch.inf
    top = draw(torch.cat([teacher, torch.full((300, 4), 30.0)], -1), 50, 4.0, generator(), vocab=20)
    assert int(top.indices_TU.max()) < 15 and top.entropy_T.isfinite().all()
