"""Feature distances: against float64 loops, 0 for equal features, gradients, and what each is blind to."""

import pytest
import torch

from moe_edge.formulas.feature_loss import cka_distance, cosine_distance, procrustes_distance, relative_mse

DISTANCES = (cka_distance, relative_mse, cosine_distance, procrustes_distance)


def pair(tokens: int = 24, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    teacher = torch.randn(tokens, width, dtype=torch.float64)
    return 0.7 * teacher + torch.randn(tokens, width, dtype=torch.float64), teacher


def test_mse_and_cosine_equal_slow_loops() -> None:
    student, teacher = pair()
    missed = sum(float(a - b) ** 2 for x, y in zip(student, teacher, strict=True) for a, b in zip(x, y, strict=True))
    energy = sum(float(b) ** 2 for y in teacher for b in y)
    assert float(relative_mse(student, teacher)) == pytest.approx(missed / energy, rel=1e-12)
    angles = [1 - float(x @ y) / float(x.norm() * y.norm()) for x, y in zip(student, teacher, strict=True)]
    assert float(cosine_distance(student, teacher)) == pytest.approx(sum(angles) / len(angles), rel=1e-10)


@pytest.mark.parametrize("shape", ((40, 6), (12, 30)), ids=("more tokens", "more dimensions"))
def test_procrustes_is_the_best_of_all_rotations(shape: tuple[int, int]) -> None:
    student, teacher = pair(*shape)
    x, y = (side - side.mean(0) for side in (student, teacher))
    x, y = x / x.norm(), y / y.norm()
    u, _, vh = torch.linalg.svd(x.T @ y)
    best = float((x @ u @ vh - y).square().sum() / 2)
    assert float(procrustes_distance(student, teacher)) == pytest.approx(best, abs=1e-9)
    for _ in range(20):
        rotation, _ = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64))
        assert float((x @ rotation - y).square().sum() / 2) >= best


def test_procrustes_of_unequal_widths_pads_with_zeros() -> None:
    narrow, wide = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 9, dtype=torch.float64)
    padded = torch.cat([narrow, torch.zeros(30, 5, dtype=torch.float64)], dim=1)
    assert float(procrustes_distance(narrow, wide)) == pytest.approx(
        float(procrustes_distance(padded, wide)), abs=1e-12
    )
    assert float(procrustes_distance(narrow, wide)) == pytest.approx(
        float(procrustes_distance(wide, narrow)), abs=1e-12
    )


def test_what_the_rotation_invariant_ones_ignore() -> None:
    student, _ = pair(40)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    moved = 3 * student @ rotation
    assert float(procrustes_distance(student, moved)) == pytest.approx(0.0, abs=1e-9)
    assert float(procrustes_distance(student, moved + 5)) == pytest.approx(0.0, abs=1e-9)
    assert float(cka_distance(student, moved)) == pytest.approx(0.0, abs=1e-9)
    assert float(relative_mse(student, moved)) > 0.1 and float(cosine_distance(student, moved)) > 0.1


@pytest.mark.parametrize("distance", DISTANCES, ids=lambda distance: distance.__name__)
@pytest.mark.parametrize("shape", ((24, 6), (8, 12)), ids=("more tokens", "more dimensions"))
def test_zero_where_equal_and_gradients(distance, shape) -> None:
    student, teacher = pair(*shape)
    assert float(distance(teacher, teacher)) == pytest.approx(0.0, abs=1e-9)
    assert float(distance(student, teacher)) > 0.01
    assert torch.autograd.gradcheck(lambda x: distance(x, teacher), (student.requires_grad_(),), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES, ids=lambda distance: distance.__name__)
def test_a_constant_student_and_half_precision_give_no_nan(distance) -> None:
    teacher = torch.randn(16, 8)
    for student in (torch.zeros(16, 8), torch.ones(16, 8), torch.randn(16, 8).bfloat16()):
        student.requires_grad_()
        value = distance(student, teacher)
        (slope,) = torch.autograd.grad(value, student)
        assert value.dtype == torch.float32 and value.isfinite() and slope.isfinite().all()


@pytest.mark.parametrize("distance", (relative_mse, cosine_distance))
def test_other_widths_are_refused(distance) -> None:
    with pytest.raises(ValueError, match="same tokens and width"):
        distance(torch.randn(8, 4), torch.randn(8, 5))


def test_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="same tokens"):
        procrustes_distance(torch.randn(8, 4), torch.randn(9, 4))
