"""The refit is the layer's joint weighted ridge regression, keeps the books, and asks tokens that it was not fitted on."""

import pytest
import torch

from moe_edge.compression import refit as module
from moe_edge.compression.refit import FLOOR, RIDGES, LayerFit, column_scales, refit, squared_error, token_weights
from moe_edge.models.weights import read_expert
from tests.compression.test_layer_fit import fit_of, recomputed
from tests.tiny import FAMILY_NAMES


def judged_error(fit: LayerFit, weight_T: torch.Tensor) -> float:
    return squared_error((weight_T.unsqueeze(1) * fit.residual_TD)[fit.boundary :])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_refit_keeps_the_books_and_lowers_the_error(family):
    fit = fit_of(family)
    target_TD, weight_T = fit.target(), token_weights(fit.target())
    before, missed = judged_error(fit, weight_T), fit.missed
    assert refit(fit) in RIDGES
    assert fit.missed < missed and judged_error(fit, weight_T) < before
    assert torch.allclose(fit.residual_TD, recomputed(fit, target_TD), atol=1e-4)


def test_it_is_the_weighted_joint_solution_of_a_dense_reference(monkeypatch):
    """All experts side by side in one matrix, weighted, damped by each column's energy, solved in float64."""
    monkeypatch.setattr(module, "RIDGES", (0.5,))
    fit = fit_of()
    weight_T1 = token_weights(fit.target()).double().unsqueeze(1)
    columns = []
    for expert, (token_N, gate_N) in fit.slots.items():
        gated_NF = (gate_N.unsqueeze(1) * fit.activations(expert)).double()
        columns.append(torch.zeros(len(fit.residual_TD), gated_NF.shape[1], dtype=torch.float64))
        columns[-1][token_N] = gated_NF * weight_T1[token_N]
    side_by_side = torch.cat(columns, dim=1)
    gram = side_by_side.T @ side_by_side
    scale = []
    for column_TF, (token_N, _) in zip(columns, fit.slots.values(), strict=True):
        square_F = column_TF.square().sum(dim=0) / len(token_N)
        scale.append(torch.maximum(square_F, FLOOR**2 * square_F.mean()))
    mean_square = torch.cat(scale)
    energy = gram.diagonal() / mean_square
    strength = 0.5 * energy.sum() / len(energy) * mean_square.diag()
    missed_TD = fit.residual_TD.double() * weight_T1
    expected = torch.linalg.solve(gram + strength, side_by_side.T @ missed_TD).T
    before = [read_expert(fit.view, expert).down_DF.double() for expert in fit.slots]
    assert refit(fit) == 0.5
    found = [
        read_expert(fit.view, expert).down_DF.double() - old for expert, old in zip(fit.slots, before, strict=True)
    ]
    assert torch.allclose(torch.cat(found, dim=1), expected, rtol=1e-3, atol=1e-5)


def test_all_at_once_misses_less_than_one_by_one():
    together, alone = fit_of(), fit_of()
    for expert in alone.slots:
        alone.accept_best(expert, alone.refits(expert, read_expert(alone.view, expert)))
    refit(together)
    assert together.missed < alone.missed


def test_loud_tokens_weigh_no_more_than_the_median():
    target_TD = torch.ones(5, 4) * torch.tensor([0.5, 1.0, 1.0, 3.0, 1000.0]).unsqueeze(1)
    weight_T = token_weights(target_TD)
    assert weight_T[:3].tolist() == [1.0, 1.0, 1.0]
    assert torch.allclose((weight_T.unsqueeze(1) * target_TD)[3:], torch.ones(2, 4))
    assert token_weights(torch.zeros(3, 4)).isfinite().all()


def test_quiet_neurons_count_as_loud_as_the_floor():
    gated_NF = torch.tensor([[3.0, 4.0, 1e-9, 0.0]]).expand(6, 4)
    scale_F = column_scales(gated_NF)
    assert torch.allclose(scale_F[:2], torch.tensor([3.0, 4.0]))
    assert torch.allclose(scale_F[2:], torch.full((2,), FLOOR * 2.5))
    assert bool((column_scales(torch.zeros(2, 3)) > 0).all())


def test_nothing_changes_where_no_token_judges_or_none_is_fitted():
    for boundary in (None, 0):
        fit = fit_of()
        fit.boundary = len(fit.residual_TD) if boundary is None else boundary
        old = {expert: read_expert(fit.view, expert).down_DF for expert in fit.slots}
        assert refit(fit) is None
        assert all(torch.equal(read_expert(fit.view, expert).down_DF, down_DF) for expert, down_DF in old.items())
