"""Routing counts are those of the router itself, also when experts are masked."""

import pytest
import torch

from moe_edge.compression.routing_health import routing_counts
from moe_edge.models.pruning import masked
from moe_edge.models.views import moe_layers, route
from tests.tiny import tiny_ids, tiny_model


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_counts_and_gates_are_the_routers_own(family):
    model, ids = tiny_model(family, layers=3), tiny_ids(rows=3)
    heard = {}
    views = moe_layers(model)
    handles = [
        view.experts.register_forward_pre_hook(lambda _m, inputs, i=view.position: heard.update({i: inputs[0]}))
        for view in views
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    counts, gates = routing_counts(model, ids)
    for view in views:
        index_TK, weight_TK = route(view, heard[view.position])
        expected = torch.bincount(index_TK.flatten(), minlength=view.count)
        assert counts[view.position].tolist() == expected.tolist()
        mass = torch.zeros(view.count).index_add_(0, index_TK.flatten(), weight_TK.flatten())
        torch.testing.assert_close(gates[view.position].float(), mass, rtol=1e-5, atol=1e-5)
    assert not any(view.experts._forward_pre_hooks for view in views)


def test_masked_experts_get_nothing_and_keep_their_ids():
    model, ids = tiny_model("qwen3_moe"), tiny_ids()
    with masked(model, {0: [1, 2, 5]}):
        counts, gates = routing_counts(model, ids)
    assert counts[0, [0, 3, 4]].sum() == 0 and gates[0, [0, 3, 4]].sum() == 0
    assert counts.sum(dim=1).tolist() == [ids.numel() * 2] * 2
