"""Silent neurons: the same logits as a zero column, in every family's layout, and nothing left behind."""

import pytest
import torch

from moe_edge.models.pruning import masked, masked_neurons
from moe_edge.models.views import moe_layers
from moe_edge.models.weights import expert_width, read_expert, write_expert
from tests.tiny import ALL_FAMILIES, tiny_ids, tiny_model


def random_mask(view):
    generator = torch.Generator().manual_seed(view.index)
    return torch.rand(view.count, expert_width(view), generator=generator) < 0.5


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_silent_neuron_is_a_zero_column(family):
    model, ids = tiny_model(family, layers=3), tiny_ids()
    whole = logits(model, ids)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    with masked_neurons(model, random_mask):
        found = logits(model, ids)
    torch.testing.assert_close(logits(model, ids), whole, atol=0, rtol=0)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert (found - whole).abs().max() > 1e-3
    for view in moe_layers(model):
        mask_EF = random_mask(view)
        for expert in range(view.count):
            weights = read_expert(view, expert)
            write_expert(view, expert, weights._replace(down_DF=weights.down_DF * mask_EF[expert]))
    torch.testing.assert_close(found, logits(model, ids), atol=1e-6, rtol=1e-6)


def test_it_composes_with_masked_experts_and_an_error_leaves_the_model_as_it_was():
    model, ids = tiny_model("qwen3_moe"), tiny_ids()
    kept, whole = {0: [0, 2, 5], 1: [1, 2, 3]}, logits(model, ids)
    with masked(model, kept), masked_neurons(model, lambda view: torch.ones(view.count, expert_width(view)).bool()):
        all_neurons = logits(model, ids)
    with masked(model, kept):
        torch.testing.assert_close(logits(model, ids), all_neurons, atol=0, rtol=0)
    handle = moe_layers(model)[0].experts.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), masked_neurons(model, random_mask):
        logits(model, ids)
    handle.remove()
    torch.testing.assert_close(logits(model, ids), whole, atol=0, rtol=0)
