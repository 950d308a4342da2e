"""LayerFit's residual is the truth of a forward pass, and no change that it accepts raises the error."""

import pytest
import torch

from moe_edge.compression.layers import LayerTokens, student_routing, walk_layers
from moe_edge.compression.refit import LayerFit
from moe_edge.models.pruning import masked
from moe_edge.models.views import moe_layers
from moe_edge.models.weights import read_expert
from tests.compression.action_helpers import KEPT, ROWS, block_inputs
from tests.tiny import FAMILY_NAMES, tiny_model


def captured(model) -> list[LayerTokens]:
    seen: list[LayerTokens] = []
    walk_layers(model, ROWS, lambda view, tokens: seen.append(tokens))
    return seen


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_walk_changes_nothing_and_sees_every_layer(family):
    model = tiny_model(family)
    with torch.no_grad():
        before = model(ROWS).logits
        seen = captured(model)
        assert torch.equal(model(ROWS).logits, before)
    assert [tokens.hidden_TD.shape for tokens in seen] == [(256, 64)] * 2
    assert all(torch.equal(tokens.hidden_TD, hidden) for tokens, hidden in zip(seen, block_inputs(model), strict=True))


def test_a_returned_output_is_what_the_layers_above_see():
    model = tiny_model("qwen3_moe")
    plain, silent = captured(model), []

    def silence(view, tokens):
        silent.append(tokens)
        return torch.zeros_like(tokens.output_TD)

    walk_layers(model, ROWS, silence)
    assert torch.equal(silent[0].hidden_TD, plain[0].hidden_TD)
    assert not torch.allclose(silent[1].hidden_TD, plain[1].hidden_TD)
    assert torch.equal(captured(model)[1].hidden_TD, plain[1].hidden_TD)  # and the model is as before


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("top_k", [1, 2])
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


def sum_of(fit: LayerFit) -> torch.Tensor:
    total = torch.zeros_like(fit.residual_TD)
    for expert, (token_N, _) in fit.slots.items():
        total[token_N] += fit.contribution(expert)
    return total


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
