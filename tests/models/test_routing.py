"""Using other experts than the router chooses, on every family: totals, a dense reference in float64, no trace left; the
routers' parameters, which one pattern names in all of them; and the routing gap, checked by flipping an expert.

Legend: E experts, K top-k, N experts in use, T tokens, D model.
"""

import re

import pytest
import torch
from torch import Tensor, nn

from moe_edge.models.routing import (
    ROUTER_PATTERN,
    preference,
    rerouted,
    router_logits,
    router_parameters,
    routing_gap,
    watched_gaps,
)
from moe_edge.models.taps import recorded_activations
from moe_edge.models.views import MoELayerView, expert_outputs, moe_layers, route
from tests.families.helpers import EXPERTS, IDS, LAYERS, logits, seen_by_experts
from tests.families.test_families import reference_choice, reference_scores
from tests.tiny import ALL_FAMILIES, tiny_ids, tiny_model


@pytest.fixture(scope="module", params=ALL_FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_model(request.param, experts=EXPERTS, layers=LAYERS)


def everything(_layer: int, gate_TE: Tensor, _preference_TE: Tensor) -> Tensor:
    return torch.arange(gate_TE.shape[1]).expand_as(gate_TE)


def reference_total(model: nn.Module, view: MoELayerView, hidden_TD: Tensor) -> Tensor:
    """What a token's weights sum to in the model's own routing, from the spec and the tensors; float64 [T]."""
    moe = view.family.spec(model.config.to_dict()).moe
    if moe.gating == "sparsemixer":
        return route(view, hidden_TD)[1].double().sum(dim=1)
    if moe.renormalise:
        return torch.full((len(hidden_TD),), moe.routed_scale, dtype=torch.float64)
    scores_TE = reference_scores(moe, view, hidden_TD)
    return scores_TE.gather(1, reference_choice(moe, view, scores_TE)).sum(dim=1) * moe.routed_scale


def test_all_experts_equal_a_dense_reference(model: nn.Module) -> None:
    for view in moe_layers(model):
        with rerouted(model, everything):
            hidden_TD, index_TN, weight_TN, output_TD = seen_by_experts(model, view)
        assert torch.equal(index_TN, torch.arange(EXPERTS).expand(len(hidden_TD), EXPERTS))
        scores_TE = reference_scores(view.family.spec(model.config.to_dict()).moe, view, hidden_TD)
        gate_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True)
        expected_TE = gate_TE * reference_total(model, view, hidden_TD)[:, None]
        torch.testing.assert_close(weight_TN.double(), expected_TE, rtol=1e-4, atol=1e-6)
        dense_TD = torch.einsum("te,etd->td", expected_TE, expert_outputs(view, hidden_TD).double())
        torch.testing.assert_close(output_TD.double(), dense_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, EXPERTS - 1])
def test_weights_sum_to_the_models_own_total(model: nn.Module, count: int) -> None:
    view = moe_layers(model)[0]  # later layers see other inputs when this one routes elsewhere
    own_TK = seen_by_experts(model, view)[2]
    with rerouted(model, lambda _layer, _gate_TE, preference_TE: preference_TE.topk(count).indices):
        _, index_TN, weight_TN, _ = seen_by_experts(model, view)
    assert index_TN.shape[1] == count
    torch.testing.assert_close(weight_TN.sum(dim=1), own_TK.sum(dim=1), rtol=1e-5, atol=1e-6)


def test_the_preference_gives_the_models_own_experts(model: nn.Module) -> None:
    view = moe_layers(model)[0]
    if view.groups[0] > 1:
        pytest.skip("the model's own top-k is limited to some groups")
    with torch.no_grad(), recorded_activations(model, routers=[view.index]) as found:
        model(IDS)
    own_TK = found.routing[view.index][0]
    found_TK = preference(view, found.router_logits[view.index]).topk(view.top_k).indices
    if view.family.gating == "sparsemixer":
        own_TK, found_TK = own_TK[:, :1], found_TK[:, :1]  # it draws the line for the second one itself
    assert torch.equal(own_TK.sort(dim=1).values, found_TK.sort(dim=1).values)


def test_nothing_is_left_of_it(model: nn.Module) -> None:
    before, kernel = logits(model), model.config._experts_implementation
    with pytest.raises(KeyError), rerouted(model, everything):
        assert (logits(model) - before).abs().max() > 1e-3
        raise KeyError
    assert torch.equal(logits(model), before) and model.config._experts_implementation == kernel


def test_gradients_reach_every_router(model: nn.Module) -> None:
    with rerouted(model, everything):
        loss = model(IDS).logits.square().mean()
        slopes = torch.autograd.grad(loss, list(router_parameters(model).values()))
    assert all(torch.isfinite(slope).all() and slope.abs().max() > 0 for slope in slopes)


def test_one_pattern_names_the_routers_parameters_and_no_others(model: nn.Module) -> None:
    named = {name for name, _ in model.named_parameters() if re.search(ROUTER_PATTERN, name)}
    assert named == set(router_parameters(model))
    views = moe_layers(model)
    assert len(named) == len(views) * (2 if views[0].family.router_bias else 1)


def test_a_routers_logits_are_those_that_are_recorded(model: nn.Module) -> None:
    layers = [view.index for view in moe_layers(model)]
    with torch.no_grad(), recorded_activations(model, routers=layers) as found:
        model(IDS)
    for view in moe_layers(model):
        found_TE = router_logits(view, found.expert_inputs[view.index])
        torch.testing.assert_close(found_TE, found.router_logits[view.index].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "ernie4_5_moe", "lfm2_moe"]
)
def test_the_gap_is_what_the_next_expert_lacks(family: str) -> None:
    """Raised by a little more than the gap, the next expert is chosen; by a little less, it is not."""
    model = tiny_model(family)
    view = moe_layers(model)[-1]
    hidden_TD = torch.randn(12, model.config.hidden_size)
    gap_T = routing_gap(view, hidden_TD)
    assert (gap_T >= 0).all() and torch.isfinite(gap_T).all()
    before = [set(row.tolist()) for row in route(view, hidden_TD)[0]]
    for token in range(12):
        flips = {
            factor: sets_chosen(view, hidden_TD[token : token + 1], float(gap_T[token]) * factor)
            for factor in (0.9, 1.1)
        }
        assert before[token] not in flips[1.1] or len(flips[1.1]) > 1, (family, token)
        if view.groups[0] == 1:  # ties between groups are not looked at
            assert flips[0.9] == [before[token]], (family, token)


def sets_chosen(view: MoELayerView, hidden_1D: Tensor, raised: float) -> list[set[int]]:
    """The distinct sets chosen when any single expert's selection score is raised."""
    found: list[set[int]] = []
    for expert in range(view.count):
        with raised_score(view, expert, raised):
            chosen = set(route(view, hidden_1D)[0][0].tolist())
        if chosen not in found:
            found.append(chosen)
    return found


class raised_score:
    """One expert's selection bias, or router logit, higher by an amount."""

    def __init__(self, view: MoELayerView, expert: int, amount: float) -> None:
        bias = view.selection_bias
        self.row = None if bias is None else bias.tensor.select(bias.axis, expert)
        self.view, self.expert, self.amount = view, expert, amount

    def __enter__(self) -> None:
        if self.row is not None:
            self.row.data += self.amount
            return
        linear = torch.nn.functional.linear

        def shifted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            out = linear(x, weight, bias)
            if out.shape[-1] == self.view.count:
                out = out.clone()
                out[..., self.expert] += self.amount
            return out

        self.kept, torch.nn.functional.linear = linear, shifted

    def __exit__(self, *_: object) -> None:
        if self.row is not None:
            self.row.data -= self.amount
        else:
            torch.nn.functional.linear = self.kept


def test_one_gap_per_layer_and_pass_and_no_hook_left() -> None:
    model = tiny_model("qwen3_moe", layers=3)
    with watched_gaps(model) as gaps, torch.no_grad():
        model(input_ids=tiny_ids(10, 1))
    assert len(gaps) == 3 and all(gap.shape == (10,) for gap in gaps)
    with torch.no_grad():
        model(input_ids=tiny_ids(10, 1))
    assert len(gaps) == 3


def test_with_all_experts_chosen_nothing_can_flip() -> None:
    model = tiny_model("qwen3_moe", experts=4, top_k=4)
    view = moe_layers(model)[0]
    assert torch.isinf(routing_gap(view, torch.randn(3, model.config.hidden_size))).all()
