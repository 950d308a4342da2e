"""Divergences against dense float64 autograd, and what the cache's truncation costs in gradient."""

import pytest
import torch
from torch import Tensor

from moe_edge.contracts.errors import ConfigError
from moe_edge.formulas.divergence import (
    CHUNK_TOKENS,
    IGNORED_LABEL,
    cached_kl,
    cross_entropy,
    kl_dense,
    teacher_topk,
    temperature_index,
    tempered,
)
from moe_edge.formulas.logit_views import WholeLogits

TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0)


def logits_pair(tokens: int = 24, vocab: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    zipf_V = -1.4 * torch.arange(1, vocab + 1, dtype=torch.float32).log()
    teacher = zipf_V + torch.randn(tokens, vocab, generator=generator)
    student = teacher + 0.7 * torch.randn(tokens, vocab, generator=generator)
    return teacher, student


def reference_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    p, q = (torch.log_softmax(x.double() / temperature, -1) for x in (teacher, student))
    return (p.exp() * (p - q)).sum(-1)


def slope(loss_T: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss_T.sum(), student)[0]


def cached(teacher: Tensor, student: Tensor, k: int, temperature: float) -> Tensor:
    top = teacher_topk(teacher, k, TEMPERATURES)
    tail = top.tail_logmass_TH[:, TEMPERATURES.index(temperature)]
    return cached_kl(WholeLogits(student), top.indices_TK, top.logprobs_TK, tail, temperature)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dense_equals_float64(temperature: float) -> None:
    teacher, student = logits_pair(tokens=CHUNK_TOKENS + 9)
    expected = reference_kl(teacher, student, temperature)
    torch.testing.assert_close(kl_dense(teacher, student, temperature).double(), expected, rtol=1e-4, atol=1e-6)


def test_padding_columns_are_dropped() -> None:
    teacher, student = logits_pair()
    padded = torch.cat([student, torch.full((len(student), 8), 30.0)], -1)
    assert torch.equal(kl_dense(teacher, padded), kl_dense(teacher, student))
    assert torch.equal(kl_dense(padded, padded + 0, vocab=400), torch.zeros(len(student)))
    wide = teacher_topk(torch.cat([teacher, torch.full((len(teacher), 8), 30.0)], -1), 16, (1.0,), vocab=400)
    for ours, expected in zip(wide, teacher_topk(teacher, 16, (1.0,)), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_capture_is_exact(temperature: float) -> None:
    teacher, _ = logits_pair()
    top = teacher_topk(teacher, 32, TEMPERATURES)
    p_TV = torch.softmax(teacher.double() / temperature, -1)
    tail = 1 - p_TV.gather(-1, top.indices_TK).sum(-1)
    stored = top.tail_logmass_TH[:, TEMPERATURES.index(temperature)]
    torch.testing.assert_close(stored.double().exp(), tail, rtol=1e-5, atol=1e-7)
    ours = tempered(top.logprobs_TK, stored, temperature).exp()
    torch.testing.assert_close(ours.double(), p_TV.gather(-1, top.indices_TK), rtol=1e-4, atol=1e-7)
    assert (top.logprobs_TK.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("temperature", (1.0, 2.0))
@pytest.mark.parametrize("k", (1, 16, 400))
def test_zero_at_the_teacher(k: int, temperature: float) -> None:
    teacher, _ = logits_pair()
    student = (teacher + 3.0).requires_grad_()
    loss_T = cached(teacher, student, k, temperature)
    assert (loss_T >= 0).all()
    assert float(loss_T.detach().max()) < 1e-5
    assert float(slope(loss_T, student).abs().max()) < 1e-5


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_whole_vocabulary_is_the_dense_kl(temperature: float) -> None:
    teacher, student = logits_pair()
    student.requires_grad_()
    ours, dense = cached(teacher, student, 400, temperature), reference_kl(teacher, student, temperature)
    torch.testing.assert_close(ours.double(), dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slope(ours, student), slope(dense, student), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("temperature", (1.0, 2.0, 4.0))
def test_gradient_on_kept_ids_is_q_minus_p(temperature: float) -> None:
    teacher, student = logits_pair()
    student.requires_grad_()
    ours = slope(cached(teacher, student, 16, temperature), student) * temperature
    full = slope(reference_kl(teacher, student, temperature), student) * temperature
    ids = teacher_topk(teacher, 16, TEMPERATURES).indices_TK
    torch.testing.assert_close(ours.gather(-1, ids), full.gather(-1, ids).float(), rtol=1e-3, atol=1e-6)
    off = full.scatter(-1, ids, 0.0).sum(-1)
    torch.testing.assert_close(ours.scatter(-1, ids, 0.0).sum(-1), off.float(), rtol=1e-3, atol=1e-5)


def test_lower_bound_of_the_full_kl() -> None:
    teacher, student = logits_pair(seed=3)
    full = reference_kl(teacher, student)
    previous = torch.zeros(len(full), dtype=torch.float64)
    for k in (4, 16, 64, 256):
        ours = cached(teacher, student, k, 1.0).double()
        assert (ours >= previous - 1e-5).all() and (ours <= full + 1e-5).all()
        previous = ours


def test_gradient_error_with_and_without_tail() -> None:
    teacher, student = logits_pair(tokens=64, vocab=4000)
    student.requires_grad_()
    for temperature in (1.0, 2.0):
        full = slope(reference_kl(teacher, student, temperature), student)

        def error(loss_T: Tensor, full: Tensor = full) -> float:
            return float((slope(loss_T, student) - full).norm() / full.norm())

        def renormalised(k: int, temperature: float = temperature) -> Tensor:
            values, ids = (teacher / temperature).topk(k)
            p = values.softmax(-1)
            return (p * (p.log() - (student / temperature).log_softmax(-1).gather(-1, ids))).sum(-1)

        with_tail = {k: error(cached(teacher, student, k, temperature)) for k in (16, 32, 64)}
        without = {k: error(renormalised(k)) for k in (16, 32, 64)}
        assert with_tail[16] > with_tail[32] > with_tail[64]
        assert with_tail[32] < 0.5 * without[64]
        assert all(with_tail[k] < without[k] for k in with_tail)


def test_extreme_students_stay_finite() -> None:
    teacher, _ = logits_pair()
    for student in (1e4 * torch.randn_like(teacher), torch.zeros_like(teacher)):
        student.requires_grad_()
        loss_T = cached(teacher, student, 32, 2.0)
        assert loss_T.isfinite().all() and slope(loss_T, student).isfinite().all()


def test_a_teacher_without_tail_mass() -> None:
    teacher, student = logits_pair()
    peaked = teacher.clone()
    peaked[:, 0] = 500.0
    student.requires_grad_()
    loss_T = cached(peaked, student, 16, 1.0)
    torch.testing.assert_close(loss_T.double(), reference_kl(peaked, student), rtol=1e-4, atol=1e-5)
    assert slope(loss_T, student).isfinite().all()


def test_unlisted_temperature_is_refused() -> None:
    assert temperature_index(3, TEMPERATURES) == 3
    with pytest.raises(ConfigError, match="2.5") as caught:
        temperature_index(2.5, TEMPERATURES)
    assert "1, 1.5, 2, 3, 4" in str(caught.value)


def test_cross_entropy_ignores_marked_labels() -> None:
    _, student = logits_pair(tokens=3)
    labels = torch.tensor([5, IGNORED_LABEL, 7])
    expected = -torch.log_softmax(student.double(), -1)
    loss_T = cross_entropy(student, labels)
    assert loss_T[1] == 0
    torch.testing.assert_close(loss_T[[0, 2]].double(), expected[[0, 2], [5, 7]], rtol=1e-5, atol=1e-6)
