"""merge: permuted copies flow together, rotated ones are refused, and no accepted merge makes a layer worse."""

import pytest
import torch

from moe_edge.compression.layers import Material
from moe_edge.compression.surgery import apply_plan
from moe_edge.contracts.errors import ConfigError
from moe_edge.formulas.cka import cka_from_hsic
from moe_edge.formulas.merging import assign_merges
from moe_edge.models.views import moe_layers
from moe_edge.models.weights import read_expert
from tests.compression.action_helpers import HALF, ROWS, kl_nats, log_probabilities, material, plan8, planted
from tests.tiny import tiny_ids


@pytest.mark.parametrize("kind", ["permuted", "rotated"])
def test_cka_proposes_the_planted_pairs_whatever_their_relation(kind):
    stats = material(planted(kind)).statistics
    cka_EE = cka_from_hsic(stats.gated_hsic_LEE)[0]
    pairs = cka_EE[torch.arange(4), torch.arange(4, 8)]
    assert pairs.min() > 0.98
    assert assign_merges(stats, HALF) == {layer: {4: 0, 5: 1, 6: 2, 7: 3} for layer in (0, 1)}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_permuted_copies_are_merged_and_half_the_experts_are_the_teacher(family):
    model = planted("permuted", family=family)
    teacher, fresh = log_probabilities(model), tiny_ids(rows=4, seed=9)
    teacher_fresh, given = log_probabilities(model, fresh), material(model)
    applied = apply_plan(model, plan8(action="merge", merges=assign_merges(given.statistics, HALF)), given)
    assert len(applied.pairs) == 8 and all(pair["accepted"] for pair in applied.pairs)
    assert max(pair["substitution_error"] for pair in applied.pairs) < 1e-6
    assert min(pair["cka"] for pair in applied.pairs) > 0.98
    assert max(pair["matching_cost"] for pair in applied.pairs) < 1e-3
    assert [(view.count, view.top_k) for view in moe_layers(model)] == [(4, 2), (4, 2)]
    assert kl_nats(teacher, log_probabilities(model)) < 1e-3
    assert kl_nats(teacher_fresh, log_probabilities(model, fresh)) < 1e-3


def test_without_the_matching_the_same_mean_destroys_the_expert(monkeypatch):
    """What the Hungarian algorithm is for: the planted copies averaged neuron by neuron are refused by the layer's error."""
    model = planted("permuted")
    given = material(model)
    identity = torch.arange(32)
    monkeypatch.setattr("moe_edge.compression.merge.neuron_matching", lambda *_: (identity, 1.0))
    merges = assign_merges(given.statistics, HALF)
    applied = apply_plan(model, plan8(action="merge", merges=merges), given)
    assert not any(pair["accepted"] for pair in applied.pairs)


def test_rotated_copies_are_refused_and_the_student_is_the_dropped_one():
    model, dropped = planted("rotated"), planted("rotated")
    given = material(model)
    apply_plan(dropped, plan8())
    applied = apply_plan(model, plan8(action="merge", merges=assign_merges(given.statistics, HALF)), given)
    assert len(applied.pairs) == 8 and not any(pair["accepted"] for pair in applied.pairs)
    assert min(pair["substitution_error"] for pair in applied.pairs) > 0.9
    assert min(pair["cka"] for pair in applied.pairs) > 0.98
    assert all("substitution error" in pair["reason"] for pair in applied.pairs)
    assert torch.equal(log_probabilities(model), log_probabilities(dropped))


@pytest.mark.parametrize(("noise", "sequential"), [(0.1, True), (0.4, False)])
def test_an_accepted_merge_is_never_worse_than_dropping(noise, sequential):
    model, dropped = planted("permuted", noise), planted("permuted", noise)
    teacher, given = log_probabilities(model), material(model)
    merges = assign_merges(given.statistics, HALF)
    applied = apply_plan(model, plan8(action="merge", merges=merges, sequential=sequential), given)
    apply_plan(dropped, plan8())
    assert sum(pair["accepted"] for pair in applied.pairs) >= 4
    for record in applied.layers:
        assert record["missed"] <= record["missed_after_dropping"] + 1e-5
    assert applied.layers[0]["missed"] < applied.layers[0]["missed_after_dropping"]
    for pair in applied.pairs:
        if pair["accepted"]:
            assert pair["missed_after"] <= pair["missed_before"] + 1e-5
    assert kl_nats(teacher, log_probabilities(model)) < kl_nats(teacher, log_probabilities(dropped))


def test_a_merge_is_deterministic():
    weights = []
    for _ in range(2):
        model = planted("permuted", 0.2)
        given = material(model)
        apply_plan(model, plan8(action="merge", merges=assign_merges(given.statistics, HALF)), given)
        weights.append(read_expert(moe_layers(model)[1], 2))
    assert all(torch.equal(one, other) for one, other in zip(weights[0][:3], weights[1][:3], strict=True))


def test_a_merge_needs_calibration_rows():
    model = planted("permuted")
    with pytest.raises(ConfigError, match="needs a profile"):
        apply_plan(model, plan8(action="merge", merges={0: {4: 0}}), Material())
    assert moe_layers(model)[0].count == 8
    assert ROWS.shape == (8, 32)
