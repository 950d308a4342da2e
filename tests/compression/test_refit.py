"""A layer's residual is the truth of a forward pass, no accepted change raises the error, and the refit is the layer's joint
weighted ridge regression, which asks tokens that it was not fitted on."""

import pytest
import torch

from moe_edge.compression import refit as module
from moe_edge.compression.layers import student_routing
from moe_edge.compression.refit import FLOOR, RIDGES, LayerFit, column_scales, refit, squared_error, token_weights
from moe_edge.models.pruning import masked
from moe_edge.models.views import moe_layers
from moe_edge.models.weights import read_expert
from tests.compression.action_helpers import KEPT, ROWS
from tests.compression.test_layers import captured
from tests.tiny import FAMILY_NAMES, tiny_model


def fit_of(family: str = "qwen2_moe") -> LayerFit:
    model = tiny_model(family)
    view, tokens = moe_layers(model)[0], captured(model)[0]
    routing = student_routing(model, view, tokens.hidden_TD, KEPT[0], 2)
    return LayerFit(view, tokens.hidden_TD, tokens.output_TD, *routing)


def recomputed(fit: LayerFit, target_TD: torch.Tensor) -> torch.Tensor:
    residual = target_TD.clone()
    for expert, (token_N, _) in fit.slots.items():
        residual[token_N] -= fit.contribution(expert)
    return residual


def sum_of(fit: LayerFit) -> torch.Tensor:
    total = torch.zeros_like(fit.residual_TD)
    for expert, (token_N, _) in fit.slots.items():
        total[token_N] += fit.contribution(expert)
    return total


@pytest.mark.parametrize(("family", "top_k"), [("qwen3_moe", 1), ("qwen2_moe", 2), ("mixtral", 2), ("olmoe", 1)])
def test_the_residual_is_teacher_minus_masked_student(family, top_k):
    model = tiny_model(family)
    view, tokens = moe_layers(model)[0], captured(model)[0]
    routing = student_routing(model, view, tokens.hidden_TD, KEPT[0], top_k)
    assert set(routing[0].flatten().tolist()) <= set(KEPT[0]) and routing[0].shape == (256, top_k)
    fit = LayerFit(view, tokens.hidden_TD, tokens.output_TD, *routing)
    outputs = []
    hook = view.experts.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with masked(model, {0: KEPT[0]}, top_k), torch.no_grad():
        model(ROWS)
    hook.remove()
    assert torch.allclose(fit.residual_TD, tokens.output_TD - outputs[0], atol=1e-5)
    assert torch.allclose(fit.output(tokens.output_TD), outputs[0], atol=1e-5)
    expected = (tokens.output_TD - outputs[0]).square().sum() / tokens.output_TD.square().sum()
    assert fit.missed == pytest.approx(float(expected), rel=1e-4)


def test_refits_lower_the_error_and_keep_the_books():
    fit = fit_of()
    target_TD = fit.target()
    assert torch.allclose(target_TD, fit.residual_TD + sum_of(fit), atol=1e-6)
    before, errors = fit.missed, [fit.missed]
    for expert in fit.slots:
        fit.accept_best(expert, fit.refits(expert, read_expert(fit.view, expert)))
        errors.append(fit.missed)
    assert all(later <= earlier for earlier, later in zip(errors, errors[1:], strict=False))
    assert fit.missed < 0.9 * before
    assert torch.allclose(fit.residual_TD, recomputed(fit, target_TD), atol=1e-4)


def test_a_refusal_leaves_every_bit():
    fit = fit_of()
    old, residual = read_expert(fit.view, 2), fit.residual_TD.clone()
    worse = old._replace(down_DF=-5 * old.down_DF)
    assert not fit.accept_best(2, [worse]) and not fit.accept_best(2, [worse], slack=1e-6)
    assert not fit.accept_best(2, [old]) and fit.accept_best(2, [old], slack=1e-6)
    assert torch.equal(read_expert(fit.view, 2).down_DF, old.down_DF)
    assert torch.allclose(fit.residual_TD, residual, atol=1e-6)


def test_a_wrong_scale_is_found_again():
    fit = fit_of()
    target_TD = sum_of(fit)
    fit.residual_TD, fit.energy = torch.zeros_like(target_TD), float(target_TD.double().square().sum())
    weights = read_expert(fit.view, 3)
    assert fit.accept_best(3, [weights._replace(down_DF=0.5 * weights.down_DF)], slack=1.0)
    before = fit.missed
    assert before > 0.01 and fit.rescale() >= 1
    assert fit.missed < 1e-3 * before  # the others moved a little, too: one expert after the other
    assert torch.allclose(read_expert(fit.view, 3).down_DF, weights.down_DF, rtol=0.02, atol=1e-5)


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
