"""Matching by depth and by similarity: against every monotone map and every assignment there is, and a slow loop."""

from itertools import combinations_with_replacement, permutations

import pytest
import torch

from moe_edge.formulas.matching import best_monotone_map, expert_owners, group_outputs, group_usage, proportional_map


@pytest.mark.parametrize(("students", "teachers"), ((4, 6), (6, 4), (5, 5), (1, 4), (3, 1)))
def test_the_best_of_all_monotone_maps(students: int, teachers: int) -> None:
    for seed in range(20):
        similarity = torch.rand(students, teachers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        every = combinations_with_replacement(range(teachers), students)
        best = max(sum(float(similarity[j, g]) for j, g in enumerate(path)) for path in every)
        path = best_monotone_map(similarity)
        assert path == sorted(path) and len(path) == students
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


def test_equal_counts_are_the_best_assignment() -> None:
    for seed in range(10):
        similarity = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = max(sum(float(similarity[j, e]) for e, j in enumerate(p)) for p in permutations(range(5)))
        owners = expert_owners(similarity).tolist()
        assert sorted(owners) == [0, 1, 2, 3, 4]
        assert sum(float(similarity[j, e]) for e, j in enumerate(owners)) == pytest.approx(best)


def test_what_is_left_joins_the_nearest_and_no_student_stays_without() -> None:
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.1, torch.nan], [0.3, 0.5, 0.2, 0.0, torch.nan]])
    assert expert_owners(similarity).tolist() == [0, 1, 0, 0, -1]


def test_more_students_than_teachers() -> None:
    assert expert_owners(torch.tensor([[0.2, 0.1], [0.9, 0.3], [0.1, 0.8]])).tolist() == [1, 2]


def test_usage_is_shared_out() -> None:
    usage = group_usage(torch.tensor([6, 2, 4, 8]), torch.tensor([1, 0, 1, -1]), 3)
    assert usage.tolist() == pytest.approx([2 / 12, 10 / 12, 0])
    assert group_usage(torch.zeros(4), torch.tensor([1, 0, 1, -1]), 3).sum() == 0


def test_the_mean_equals_a_slow_loop() -> None:
    output, score = torch.randn(4, 5, 3, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    owners = torch.tensor([1, 0, 1, -1])
    found = group_outputs(output, score, owners, 3)
    for token in range(5):
        both = (score[token, 0] * output[0, token] + score[token, 2] * output[2, token]) / (
            score[token, 0] + score[token, 2]
        )
        torch.testing.assert_close(found[1, token], both)
        torch.testing.assert_close(found[0, token], output[1, token])
    assert not found[2].any()
