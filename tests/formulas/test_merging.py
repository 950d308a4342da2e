"""Merging: groups, matched neurons and means against slow references; experts side by side and their constants."""

from types import SimpleNamespace

import pytest
import torch

from moe_edge.formulas.ffn import Ffn, concatenate, mean_gates, neuron_rows, weighted_mean
from moe_edge.formulas.merging import (
    MOST_MEMBERS,
    PairTest,
    assign_merges,
    neuron_matching,
    null_ceiling,
    ratio_error,
    substitution,
)


def ffn(seed: int, width: int = 12, hidden: int = 5, biased: bool = False) -> Ffn:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(width, hidden), (width, hidden), (hidden, width), (width,), (width,), (hidden,)]
    return Ffn(*(torch.randn(*shape, generator=generator) for shape in shapes[: 6 if biased else 3]))


def run(network: Ffn, hidden_TD: torch.Tensor) -> torch.Tensor:
    gate, up = hidden_TD @ network.gate_FD.T, hidden_TD @ network.up_FD.T
    if network.gate_bias_F is not None:
        gate, up = gate + network.gate_bias_F, up + network.up_bias_F
    out = (torch.nn.functional.silu(gate) * up) @ network.down_DF.T
    return out if network.down_bias_D is None else out + network.down_bias_D


def stats(cka: list[list[float]], null: float = 0.0) -> SimpleNamespace:
    """One layer whose gated and plain CKA is `cka` (unit variances)."""
    hsic_LEE = torch.tensor(cka, dtype=torch.float64)[None]
    return SimpleNamespace(hsic_LEE=hsic_LEE, gated_hsic_LEE=hsic_LEE, null_hsic_LEE=torch.full_like(hsic_LEE, null))


SIMILAR = [[1.0, 0.2, 0.9, 0.1], [0.2, 1.0, 0.3, -0.2], [0.9, 0.3, 1.0, 0.0], [0.1, -0.2, 0.0, 1.0]]


def test_every_dropped_expert_goes_to_its_nearest_kept_one():
    assert assign_merges(stats(SIMILAR), {0: [0, 1]}) == {0: {2: 0, 3: 0}}
    assert assign_merges(stats(SIMILAR), {0: [1, 2]}) == {0: {0: 2}}  # expert 3 resembles neither
    assert assign_merges(stats(SIMILAR), {0: [0, 1, 2, 3]}) == {0: {}}


def test_pairs_inside_the_null_or_without_evidence_are_left_out():
    assert null_ceiling(stats(SIMILAR, null=0.15)).tolist() == [0.15]
    assert assign_merges(stats(SIMILAR, null=0.15), {0: [0, 1]}) == {0: {2: 0}}
    silent = stats(SIMILAR)
    silent.gated_hsic_LEE = silent.gated_hsic_LEE.clone()
    silent.gated_hsic_LEE[0, 2] = silent.gated_hsic_LEE[0, :, 2] = 0.0  # expert 2 saw no token: its CKA is NaN
    assert assign_merges(silent, {0: [0, 1]}) == {0: {3: 0}}


def test_a_kept_expert_takes_a_limited_number_of_members():
    experts = MOST_MEMBERS + 4
    cka = torch.eye(experts) + 0.5 * (1 - torch.eye(experts))
    cka[0, 1:] = cka[1:, 0] = 0.9
    merges = assign_merges(stats(cka.tolist()), {0: [0, 1]})[0]
    assert sorted(merges) == list(range(2, experts))
    assert [list(merges.values()).count(kept) for kept in (0, 1)] == [MOST_MEMBERS, experts - 2 - MOST_MEMBERS]


def test_the_substitution_error_is_the_least_over_alpha():
    generator = torch.Generator().manual_seed(0)
    kept, dropped = torch.randn(2, 30, 4, generator=generator).unbind(0)
    dropped = dropped + 0.7 * kept
    error, alpha = substitution(kept, dropped)
    slow = {
        step / 1000: float((dropped - step / 1000 * kept).square().sum() / dropped.square().sum())
        for step in range(2000)
    }
    assert error == pytest.approx(min(slow.values()), abs=1e-6)
    assert alpha == pytest.approx(min(slow, key=slow.get), abs=1e-3)
    assert substitution(kept, 3 * kept) == (pytest.approx(0, abs=1e-7), pytest.approx(3))
    assert substitution(kept, torch.zeros_like(kept)) == substitution(torch.zeros_like(kept), kept) == (1.0, 0.0)


def test_the_ratio_error_is_what_the_best_static_merge_loses():
    generator = torch.Generator().manual_seed(1)
    gates = torch.rand(2, 40, generator=generator)
    gates[0, :5] = 0.0
    out_i, out_j = torch.randn(2, 40, 3, generator=generator).unbind(0)
    mixed = gates[0, :, None] * out_i + gates[1, :, None] * out_j

    def lost(share: float) -> float:
        static = (gates[0] + gates[1])[:, None] * (share * out_i + (1 - share) * out_j)
        return float((mixed - static).double().square().sum() / mixed.double().square().sum())

    slow = min(lost(step / 2000) for step in range(2001))
    assert ratio_error(gates[0], gates[1], out_i, out_j) == pytest.approx(slow, abs=1e-6)
    assert ratio_error(gates[0], 2 * gates[0], out_i, out_j) == pytest.approx(0, abs=1e-12)  # a constant ratio
    assert ratio_error(gates[0], gates[1], out_i, out_i) == 0.0  # outputs that agree


@pytest.mark.parametrize(
    ("test", "word"),
    [
        (PairTest(0.1, 1.0, 0.05, 100), None),
        (PairTest(0.1, 1.0, 0.05, 15), "15 tokens"),
        (PairTest(0.6, 1.0, 0.05, 100), "substitution error 0.600"),
        (PairTest(0.1, 1.0, 0.2, 100), "router-ratio error 0.200"),
        (PairTest(float("nan"), 1.0, 0.0, 100), "substitution error nan"),
    ],
)
def test_the_gate_says_why(test, word):
    assert (test.refusal is None) if word is None else (word in test.refusal)


@pytest.mark.parametrize("biased", [False, True])
def test_matching_undoes_a_permutation(biased):
    expert, hidden_TD = ffn(0, biased=biased), torch.randn(50, 5, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    shuffled = expert.select(order)
    assert torch.allclose(run(shuffled, hidden_TD), run(expert, hidden_TD), atol=1e-5)

    def acts(network: Ffn) -> torch.Tensor:
        return torch.nn.functional.silu(hidden_TD @ network.gate_FD.T) * (hidden_TD @ network.up_FD.T)

    found, cost = neuron_matching(acts(expert), acts(shuffled), neuron_rows(expert), neuron_rows(shuffled))
    assert torch.equal(order[found], torch.arange(12)) and cost == pytest.approx(0, abs=1e-6)
    _, other = neuron_matching(acts(expert), acts(ffn(1)), neuron_rows(expert), neuron_rows(ffn(1)))
    assert other > 0.5
    for one, back in zip(expert, shuffled.select(found), strict=True):
        assert one is back is None or torch.equal(one, back)


def test_the_matching_is_the_cheapest_of_all_orders():
    from itertools import permutations

    one, other = ffn(4, width=5), ffn(5, width=5)
    act, other_act = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(6)).unbind(0)
    found, _ = neuron_matching(act, other_act, neuron_rows(one), neuron_rows(other))
    pairs = ((act.T, other_act.T), (neuron_rows(one), neuron_rows(other)))
    costs = [torch.cdist(a.double(), b.double()) for a, b in pairs]
    cost = sum(matrix / matrix.mean() for matrix in costs)
    slow = min(
        permutations(range(5)), key=lambda order: float(sum(cost[row, column] for row, column in enumerate(order)))
    )
    assert tuple(found.tolist()) == slow


def test_means_are_weighted_and_fall_back_to_equal_shares():
    one, other = ffn(0, biased=True), ffn(1, biased=True)
    mean = weighted_mean([one, other], [3.0, 1.0])
    assert all(torch.allclose(m, 0.75 * a + 0.25 * b, atol=1e-6) for m, a, b in zip(mean, one, other, strict=True))
    assert torch.allclose(weighted_mean([one, other], [0.0, 0.0]).gate_FD, (one.gate_FD + other.gate_FD) / 2)
    assert weighted_mean([ffn(0), ffn(1)], [1.0, 1.0]).gate_bias_F is None


@pytest.mark.parametrize("biased", [False, True])
def test_experts_side_by_side_compute_the_scaled_sum(biased):
    parts, hidden_TD = [ffn(0, biased=biased), ffn(1, width=7, biased=biased)], torch.randn(6, 5)
    together = concatenate(parts, [0.25, 2.0])
    assert together.gate_FD.shape == (19, 5)
    expected = 0.25 * run(parts[0], hidden_TD) + 2.0 * run(parts[1], hidden_TD)
    assert torch.allclose(run(together, hidden_TD), expected, atol=1e-4)


def test_mean_gates_count_every_token():
    index_TK = torch.tensor([[0, 2], [2, 1], [2, 0]])
    weight_TK = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]])
    expected = torch.tensor([(0.6 + 0.5) / 3, 0.1 / 3, (0.4 + 0.9 + 0.5) / 3, 0.0])
    assert torch.allclose(mean_gates(index_TK, weight_TK, 4).float(), expected)
    assert not mean_gates(index_TK[:0], weight_TK[:0], 4).any()
