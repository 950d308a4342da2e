"""The refit is the layer's joint least-squares solution, keeps the books, and never harms the judging tokens."""

import pytest
import torch

from moe_edge.compression import refit as module
from moe_edge.compression.layer_fit import LayerFit, squared_error
from moe_edge.compression.refit import RIDGES, refit
from moe_edge.families.expert_weights import read_expert
from tests.compression.test_layer_fit import fit_of, recomputed, sum_of
from tests.tiny import FAMILY_NAMES


def judged_error(fit: LayerFit) -> float:
    return squared_error(fit.residual_TD[fit.boundary :])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_refit_keeps_the_books_and_lowers_the_error(family):
    fit = fit_of(family)
    target_TD, before, missed = fit.residual_TD + sum_of(fit), judged_error(fit), fit.missed
    assert refit(fit) in RIDGES
    assert fit.missed < missed and judged_error(fit) < before
    assert torch.allclose(fit.residual_TD, recomputed(fit, target_TD), atol=1e-4)


def test_it_is_the_joint_solution_of_a_dense_reference(monkeypatch):
    """All experts side by side in one matrix, solved over its columns in float64."""
    monkeypatch.setattr(module, "RIDGES", (0.05,))
    fit = fit_of()
    blocks = [
        (token_N, gate_N.unsqueeze(1) * fit.activations(expert)) for expert, (token_N, gate_N) in fit.slots.items()
    ]
    before = [read_expert(fit.view, expert).down_DF.double() for expert in fit.slots]
    columns = []
    for token_N, gated_NF in blocks:
        column_TF = torch.zeros(len(fit.residual_TD), gated_NF.shape[1], dtype=torch.float64)
        column_TF[token_N] = gated_NF.double()
        columns.append(column_TF)
    side_by_side = torch.cat(columns, dim=1)
    gram = side_by_side.T @ side_by_side
    strength = 0.05 * float(gram.diagonal().mean()) * torch.eye(len(gram), dtype=torch.float64)
    expected = torch.linalg.solve(gram + strength, side_by_side.T @ fit.residual_TD.double()).T
    assert refit(fit) == 0.05
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


def test_nothing_changes_where_no_token_judges_or_none_gains():
    for boundary in (None, 0):
        fit = fit_of()
        fit.boundary = len(fit.residual_TD) if boundary is None else boundary
        old = {expert: read_expert(fit.view, expert).down_DF for expert in fit.slots}
        assert refit(fit) is None
        assert all(torch.equal(read_expert(fit.view, expert).down_DF, down_DF) for expert, down_DF in old.items())
