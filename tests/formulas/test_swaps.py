"""Predictions of swaps against float64 loops written from their definitions.

Shape suffixes: C sets, T tokens, E experts, R gradients, D model.
"""

import math

import pytest
import torch

from moe_edge.formulas.swaps import CURVATURE_SHARE, LayerProducts, damped, predict, standard_error

C, T, E, R, D = 3, 7, 4, 3, 5


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer() -> tuple[LayerProducts, dict[str, torch.Tensor]]:
    """Products of random outputs, and what they were made of."""
    made = {"out": numbers(T, E, D), "grad": numbers(R, T, D, seed=1), "own": numbers(T, D, seed=2)}
    made |= {"teacher": numbers(T, D, seed=3), "weight": numbers(T, E, seed=4).softmax(dim=-1)}
    out, own, teacher = made["out"], made["own"], made["teacher"]
    products = LayerProducts(
        made["weight"],
        torch.einsum("rtd,ted->rte", made["grad"], out),
        torch.einsum("td,ted->te", own, out),
        torch.einsum("td,ted->te", teacher, out),
        out @ out.mT,
        torch.stack([own.square(), own * teacher, teacher.square()], dim=-1).sum(dim=1),
    )
    return products, made


def test_predictions_equal_a_loop_over_tokens():
    products, made = layer()
    weight_CTE = numbers(C, T, E, seed=5).softmax(dim=-1)
    found = predict(products, weight_CTE)
    for number in range(C):
        costs, rises = [], []
        for token in range(T):
            change = (weight_CTE[number, token] - made["weight"][token]) @ made["out"][token]
            slope, *scores = (made["grad"][:, token] @ change).tolist()
            curvature = sum(score**2 for score in scores) / len(scores) / 2
            costs.append((slope + CURVATURE_SHARE * curvature) / (1 + curvature))
            own, teacher = made["own"][token], made["teacher"][token]
            before, after = (torch.cosine_similarity(h, teacher, dim=0) for h in (own, own + change))
            rises.append(float(after - before))
        mean = sum(costs) / T
        deviation = math.sqrt(sum((cost - mean) ** 2 for cost in costs) / (T - 1))
        assert float(found.gain[number]) == pytest.approx(-mean)
        assert float(found.gain_se[number]) == pytest.approx(deviation / math.sqrt(T))
        assert float(found.likeness[number]) == pytest.approx(sum(rises) / T)


def test_no_change_is_no_gain():
    products, made = layer()
    found = predict(products, made["weight"][None])
    assert float(found.gain.abs().max()) < 1e-12 and float(found.likeness.abs().max()) < 1e-12


def test_the_cost_is_first_order_where_small_and_bounded_where_large():
    assert float(damped(torch.tensor(1e-4), torch.tensor(1e-9))) == pytest.approx(1e-4, rel=1e-3)
    assert float(damped(torch.tensor(-3.0), torch.tensor(1e6))) == pytest.approx(CURVATURE_SHARE, abs=1e-5)


def test_a_stream_of_zeros_is_like_nothing():
    products, made = layer()
    silent = products._replace(norms_T3=torch.zeros(T, 3, dtype=torch.float64), teacher_TE=products.teacher_TE * 0)
    assert torch.isfinite(predict(silent, made["weight"][None].flip(-1)).likeness).all()


def test_rows_are_the_sample_where_there_are_enough():
    """Tokens that repeat within a row carry no further evidence."""
    rows = numbers(8)
    repeated = rows.repeat_interleave(16)[None]
    assert float(standard_error(repeated, 8)[0]) == pytest.approx(float(rows.std()) / math.sqrt(8))
    assert float(standard_error(repeated, 1)[0]) == pytest.approx(float(repeated.std()) / math.sqrt(128))
