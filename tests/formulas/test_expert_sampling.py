"""Drawn experts: how many, how often, with the right chances, and what the weights add up to."""

from itertools import permutations
from math import prod, sqrt

import pytest
import torch
from torch import Tensor

from moe_edge.formulas.expert_sampling import augmented_experts, every_expert, spread_weights

TOKENS, EXPERTS = 4000, 4


def gate(tokens: int = TOKENS) -> Tensor:
    return torch.tensor([0.55, 0.25, 0.15, 0.05]).expand(tokens, EXPERTS)


def draw(probability: float, count: int = EXPERTS - 1, seed: int = 0, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    return augmented_experts(gate(tokens), gate(tokens), count, probability, torch.Generator().manual_seed(seed))


def test_lambda_zero_takes_the_top_and_lambda_one_always_samples() -> None:
    index_TN, sampled_T = draw(0.0)
    assert not sampled_T.any() and torch.equal(index_TN, torch.tensor([0, 1, 2]).expand(TOKENS, 3))
    assert draw(1.0)[1].all()


def test_the_top_goes_by_the_preference_and_the_draw_by_the_gate() -> None:
    preference_TE = gate().flip(1)
    index_TN, _ = augmented_experts(gate(), preference_TE, 1, 0.0, torch.Generator())
    assert (index_TN == 3).all()
    drawn_TN, _ = augmented_experts(gate(), preference_TE, 1, 1.0, torch.Generator().manual_seed(0))
    assert (drawn_TN == 0).float().mean() == pytest.approx(0.55, abs=5 * sqrt(0.55 * 0.45 / TOKENS))


def test_experts_are_distinct_and_the_rate_is_lambda() -> None:
    index_TN, sampled_T = draw(0.05)
    assert all(len(set(row)) == 3 for row in index_TN.tolist())
    assert sampled_T.float().mean() == pytest.approx(0.05, abs=5 * sqrt(0.05 * 0.95 / TOKENS))
    missing_T = EXPERTS * (EXPERTS - 1) // 2 - index_TN.sum(dim=1)
    assert (missing_T[~sampled_T] == 3).all() and (missing_T[sampled_T] != 3).any()


def test_who_is_left_out_has_the_chance_of_drawing_without_replacement() -> None:
    chances = [0.55, 0.25, 0.15, 0.05]
    left_out = [0.0] * EXPERTS
    for order in permutations(range(EXPERTS)):  # p1 p2/(1-p1) p3/(1-p1-p2): the last one is left out
        left = [1 - sum(chances[e] for e in order[:place]) for place in range(3)]
        left_out[order[-1]] += prod(chances[e] / left[place] for place, e in enumerate(order[:3]))
    index_TN, _ = draw(1.0)
    missing_T = EXPERTS * (EXPERTS - 1) // 2 - index_TN.sum(dim=1)
    for expert, expected in enumerate(left_out):
        margin = 5 * sqrt(expected * (1 - expected) / TOKENS)
        assert (missing_T == expert).float().mean().item() == pytest.approx(expected, abs=margin)


def test_a_seed_gives_the_same_experts_again() -> None:
    assert torch.equal(draw(0.5)[0], draw(0.5)[0]) and not torch.equal(draw(0.5)[0], draw(0.5, seed=1)[0])


def test_a_gate_that_underflows_can_still_be_drawn() -> None:
    certain_TE = torch.tensor([1.0, 0.0, 0.0]).expand(50, 3)
    index_TN, _ = augmented_experts(certain_TE, certain_TE, 2, 1.0, torch.Generator().manual_seed(0))
    assert (index_TN == 0).any(dim=1).all() and {1, 2} <= set(index_TN.flatten().tolist())


def test_weights_are_the_gate_over_the_chosen_scaled_to_the_total() -> None:
    logprob_TE = torch.randn(9, EXPERTS, generator=torch.manual_seed(0)).log_softmax(dim=1)
    index_TN, total_T = torch.tensor([3, 1]).expand(9, 2), torch.linspace(0.2, 1.8, 9)
    chosen_TN = logprob_TE.double().exp()[:, [3, 1]]
    expected_TN = chosen_TN / chosen_TN.sum(dim=1, keepdim=True) * total_T[:, None]
    torch.testing.assert_close(spread_weights(logprob_TE, index_TN, total_T), expected_TN.float())
    everything_TE = spread_weights(logprob_TE, every_expert(logprob_TE), torch.ones(9))
    torch.testing.assert_close(everything_TE, logprob_TE.exp())
