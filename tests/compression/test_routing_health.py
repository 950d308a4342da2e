"""Routing health in the compress stage: counts are the router's own; the same rows, the teacher's experts against the kept
ones, alarms by layer."""

import json

import pytest
import torch

from moe_edge.compression.routing_health import RoutingCounts, compare, observe, routing_counts
from moe_edge.models.pruning import masked, prune
from moe_edge.models.views import moe_layers, route
from tests.tiny import tiny_ids, tiny_model

KEPT = {0: [0, 1, 2, 3], 1: [0, 2, 4, 5]}


def test_teacher_and_student_are_counted_on_the_same_rows():
    ids, model = tiny_ids(rows=4), tiny_model("qwen3_moe")
    before = observe(model, ids)
    prune(model, KEPT)
    found = compare(before, observe(model, ids), KEPT, [0, 1])
    assert found.tokens == ids.numel() and json.loads(found.model_dump_json())["tokens"] == ids.numel()
    assert set(found.teacher) | {"teachers_gate_mass_kept"} == set(found.student)
    assert 0 < found.student["teachers_gate_mass_kept"] < 1
    assert found.student["gate_mass"] == pytest.approx(1.0), "this family renormalises"
    assert [row["layer"] for row in found.layers] == [0, 1]
    own = torch.stack([before.gate_sum_LE[layer, KEPT[layer]].sum() for layer in (0, 1)]) / before.gate_sum_LE.sum(1)
    assert found.student["teachers_gate_mass_kept"] == pytest.approx(float(own.mean()))


def test_a_collapsed_layer_rings_with_its_decoder_layer():
    even, one = torch.full((1, 8), 10), torch.tensor([[73, 1, 1, 1, 1, 1, 1, 1]])
    healthy, collapsed = (RoutingCounts(counts, counts.double(), 40) for counts in (even, one))
    (alarm,) = compare(healthy, collapsed, {}, [7]).alarms
    assert alarm.startswith("layer 7: one expert carries") and "so does" not in alarm
    (alarm,) = compare(collapsed, collapsed, {}, [7]).alarms
    assert "so does the teacher" in alarm
    assert compare(healthy, healthy, {}, [7]).alarms == []


def test_without_rows_nothing_is_said():
    assert observe(tiny_model("qwen3_moe"), None) is None and compare(None, None, {}, []) is None


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_counts_and_gates_are_the_routers_own(family):
    model, ids = tiny_model(family, layers=3), tiny_ids(rows=3)
    inputs_of = {}
    views = moe_layers(model)
    handles = [
        view.experts.register_forward_pre_hook(lambda _m, inputs, i=view.position: inputs_of.update({i: inputs[0]}))
        for view in views
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    counts, gates = routing_counts(model, ids)
    for view in views:
        index_TK, weight_TK = route(view, inputs_of[view.position])
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
