"""Sweeps of refits reach the joint least-squares solution, keep the books, and never harm the judging tokens."""

import pytest
import torch

from moe_edge.compression import refit
from moe_edge.compression.layer_fit import LayerFit, squared_error
from moe_edge.compression.refit import Refit
from moe_edge.families.expert_weights import read_expert
from moe_edge.families.shared_expert import shared_gate
from moe_edge.families.views import moe_layers
from tests.compression.test_layer_fit import fit_of, recomputed, sum_of
from tests.tiny import FAMILY_NAMES, tiny_model


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_refit_keeps_the_books_and_lowers_the_error(family):
    fit = fit_of(family)
    target_TD, judged = fit.residual_TD + sum_of(fit), squared_error(fit.residual_TD[fit.boundary :])
    before, run = fit.missed, Refit(fit)
    accepted = run.run()
    assert accepted and fit.missed < before and run.sweeps >= 1
    assert squared_error(fit.residual_TD[fit.boundary :]) < judged
    assert torch.allclose(fit.residual_TD, recomputed(fit, target_TD), atol=1e-4)


def test_more_sweeps_end_lower(monkeypatch):
    errors = []
    for sweeps in (1, 2, 8):
        monkeypatch.setattr(refit, "MOST_SWEEPS", sweeps)
        fit = fit_of()
        twice = _twice(fit, len(fit.residual_TD) // 2)
        assert Refit(twice).run()
        errors.append(squared_error(twice.residual_TD))
    assert errors[0] > errors[1] > errors[2]


def test_many_sweeps_reach_the_joint_solution(monkeypatch):
    """Every token judges what it was fitted on, so that nothing is refused: then the limit is plain least squares."""
    monkeypatch.setattr(refit, "MOST_SWEEPS", 400)
    monkeypatch.setattr(refit, "LEAST_GAIN", 1e-6)
    fit = fit_of()
    start_TD, half = fit.residual_TD.clone(), len(fit.residual_TD) // 2
    twice = _twice(fit, half)
    Refit(twice).run()
    columns = torch.zeros(half, 0, dtype=torch.float64)
    for expert, (token_N, gate_N) in fit.slots.items():
        gated_NF = (gate_N.unsqueeze(1) * fit.activations(expert)).double()[token_N < half]
        block = torch.zeros(half, gated_NF.shape[1], dtype=torch.float64)
        block[token_N[token_N < half]] = gated_NF
        columns = torch.cat([columns, block], dim=1)
    target_TD = start_TD[:half].double()
    best_TD = target_TD - columns @ torch.linalg.lstsq(columns, target_TD, driver="gelsd").solution
    least, start = squared_error(best_TD), squared_error(target_TD)
    reached = squared_error(twice.residual_TD[:half])
    assert (reached - least) < 0.02 * (start - least)


def _twice(fit: LayerFit, half: int) -> LayerFit:
    """The first tokens of a layer, once to fit on and once more to judge."""
    view = moe_layers(tiny_model("qwen2_moe"))[0]
    rows = torch.cat([torch.arange(half)] * 2)
    index, weight = _routing(fit)
    target_TD = (fit.residual_TD + sum_of(fit))[rows]
    doubled = LayerFit(view, fit.hidden_TD[rows], target_TD, index[rows], weight[rows])
    doubled.boundary = half
    return doubled


def _routing(fit: LayerFit) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, top_k = len(fit.hidden_TD), sum(len(token_N) for token_N, _ in fit.slots.values()) // len(fit.hidden_TD)
    index_TK = torch.zeros(tokens, top_k, dtype=torch.long)
    weight_TK, filled_T = torch.zeros(tokens, top_k), torch.zeros(tokens, dtype=torch.long)
    for expert, (token_N, gate_N) in fit.slots.items():
        index_TK[token_N, filled_T[token_N]], weight_TK[token_N, filled_T[token_N]] = expert, gate_N
        filled_T[token_N] += 1
    return index_TK, weight_TK


def test_the_rise_is_the_difference_of_two_squared_errors():
    generator = torch.Generator().manual_seed(0)
    missed_ND, gated_NF = (torch.randn(30, size, generator=generator, dtype=torch.float64) for size in (5, 7))
    change_DF = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    rise = refit._rise(change_DF, missed_ND.T @ gated_NF, gated_NF.T @ gated_NF)
    expected = squared_error(missed_ND - gated_NF @ change_DF.T) - squared_error(missed_ND)
    assert rise == pytest.approx(expected, rel=1e-9)


def test_without_tokens_that_judge_nothing_changes():
    fit = fit_of()
    fit.boundary = len(fit.residual_TD)
    old = read_expert(fit.view, 0)
    assert Refit(fit).run() == 0 and torch.equal(read_expert(fit.view, 0).down_DF, old.down_DF)


@pytest.mark.parametrize(
    "family", [name for name in FAMILY_NAMES if moe_layers(tiny_model(name))[0].shared is not None]
)
def test_a_shared_expert_is_refitted_with_the_others(family):
    alone, together = fit_of(family), fit_of(family)
    view = together.view
    gate_T1, before = shared_gate(view, together.hidden_TD), view.shared(together.hidden_TD)
    target_TD = together.residual_TD + sum_of(together)
    Refit(alone).run()
    Refit(together, with_shared=True).run()
    change_TD = gate_T1 * (view.shared(together.hidden_TD) - before)
    assert bool(change_TD.any())
    assert torch.allclose(together.residual_TD, recomputed(together, target_TD) - change_TD, atol=1e-4)
    assert squared_error(together.residual_TD[alone.boundary :]) < squared_error(alone.residual_TD[alone.boundary :])
