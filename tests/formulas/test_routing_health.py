"""Routing health against values worked out by hand: even, skewed and collapsed loads."""

import math

import pytest
import torch

from moe_edge.formulas.routing_health import (
    gate_share_kept,
    largest_over_fair,
    layer_health,
    load_entropy,
    load_variation,
)

COUNTS = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]])


def test_load_is_even_collapsed_or_in_between():
    assert load_entropy(COUNTS).tolist() == pytest.approx([1.0, 0.0, 0.5])
    assert load_variation(COUNTS).tolist() == pytest.approx([0.0, math.sqrt(3), 1.0])
    assert largest_over_fair(COUNTS).tolist() == pytest.approx([1.0, 4.0, 2.0])


def test_the_share_of_gate_mass_that_the_kept_experts_had():
    gates = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 0.0, 0.0]])
    assert gate_share_kept(gates, {0: [2, 3], 1: [0, 2]}).tolist() == pytest.approx([0.7, 0.5])


def test_the_alarm_rings_for_one_hot_expert_and_for_low_entropy():
    gates = COUNTS.double() * 0.5
    even, collapsed, half = layer_health(COUNTS, gates, tokens=10)
    assert even.alarm is None and even.dead_experts == [] and even.gate_mass == pytest.approx(1.0)
    assert "entropy" in collapsed.alarm and collapsed.dead_experts == [1, 2, 3]
    assert "entropy" in half.alarm
    assert layer_health(COUNTS, gates, 10, least_entropy=0.4)[2].alarm is None
    assert "times its even share" in layer_health(COUNTS, gates, 10, most_over_fair=1.5)[2].alarm


def test_a_layer_without_tokens_has_no_numbers():
    silent = layer_health(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4), tokens=0)[0]
    assert silent.load_entropy is None and silent.gate_mass is None and silent.alarm == "nothing was routed"
    assert math.isnan(float(load_entropy(torch.zeros(1, 4))[0]))


def test_a_single_expert_is_even():
    assert load_entropy(torch.tensor([[7]])).tolist() == [1.0]
