"""Layer maps: the dynamic programme against every monotone map there is."""

from itertools import combinations_with_replacement

import pytest
import torch

from moe_edge.formulas.layer_map import best_monotone_map, proportional_map


@pytest.mark.parametrize(("ours", "theirs"), ((4, 6), (6, 4), (5, 5), (1, 4), (3, 1)))
def test_the_best_of_all_monotone_maps(ours: int, theirs: int) -> None:
    for seed in range(20):
        similarity = torch.rand(ours, theirs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        every = combinations_with_replacement(range(theirs), ours)
        best = max(sum(float(similarity[j, g]) for j, g in enumerate(path)) for path in every)
        path = best_monotone_map(similarity)
        assert path == sorted(path) and len(path) == ours
        assert sum(float(similarity[j, g]) for j, g in enumerate(path)) == pytest.approx(best, abs=1e-12)


def test_greedy_would_step_back() -> None:
    similarity = torch.tensor([[0.1, 0.3, 0.9], [0.8, 0.7, 0.1], [0.1, 0.6, 0.5]])
    assert best_monotone_map(similarity) == [1, 1, 1]


def test_equal_layers_and_missing_evidence() -> None:
    assert best_monotone_map(torch.eye(4)) == [0, 1, 2, 3]
    assert best_monotone_map(torch.tensor([[torch.nan, 0.5], [torch.nan, torch.nan]])) == [1, 1]
    assert best_monotone_map(torch.ones(3, 3)) == [0, 0, 0]


def test_proportional() -> None:
    assert proportional_map(4, 8) == [1, 3, 5, 7]
    assert proportional_map(8, 4) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert proportional_map(5, 5) == [0, 1, 2, 3, 4]
    assert proportional_map(3, 1) == [0, 0, 0]
    assert proportional_map(12, 36)[-1] == 35
