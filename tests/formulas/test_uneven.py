"""Dealing out experts over layers: worked out by hand, within bounds, and even where nothing is known."""

from types import SimpleNamespace

import pytest
import torch

from moe_edge.formulas.selection import CRITERIA
from moe_edge.formulas.uneven import SCORES, bounds, deal, keep_uneven, score_shares

SHARES = torch.tensor([[0.7, 0.2, 0.06, 0.04], [0.3, 0.3, 0.2, 0.2], [0.4, 0.3, 0.29, 0.01]]).double()


def test_the_largest_shares_stay() -> None:
    # beyond one expert per layer: .3 .3 .29 stay first, then .2 .2 .2 (the first one's second and two of the second's)
    assert deal(SHARES, 2, 1, 4) == [1, 2, 3]
    assert deal(SHARES, 3, 1, 4) == [2, 4, 3]
    assert deal(SHARES, 3, 2, 3) == [3, 3, 3]
    assert deal(SHARES, 4, 1, 4) == [4, 4, 4]


def test_groups_gain_one_expert_each() -> None:
    # the layers' groups are (.7, .2) (.06, .04), (.3, .3) (.2, .2), (.4, .3) (.29, .01): second units .24, .5, .31
    assert deal(SHARES, 2, 2, 4, groups=2) == [2, 2, 2]
    assert sum(deal(SHARES[:2], 2, 2, 4, groups=2)) == 4
    two = torch.cat([SHARES, SHARES[1:2]])
    assert deal(two, 3 * 2 // 2 + 1, 2, 4, groups=2) == [4, 4, 4, 4]
    wide = torch.rand(4, 12, generator=torch.Generator().manual_seed(0)).double()
    counts = deal(wide / wide.sum(1, keepdim=True), 8, 4, 12, groups=4)
    assert sum(counts) == 32 and all(count % 4 == 0 and 4 <= count <= 12 for count in counts)


@pytest.mark.parametrize("numbers", [(5, 1, 4), (1, 2, 4), (2, 1, 5)])
def test_impossible_bounds_are_an_error(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot deal"):
        deal(SHARES, *numbers)
    with pytest.raises(ValueError, match="cannot deal"):
        deal(SHARES, 3, 2, 4, groups=2)


def test_bounds_are_half_the_average_and_what_is_possible() -> None:
    assert bounds(6, range(2, 9)) == (3, 8)
    assert bounds(5, [4, 5, 6, 7, 8]) == (4, 8)
    assert bounds(6, range(2, 9), most=7) == (3, 7) and bounds(6, range(2, 9), most=4) == (3, 6)
    assert bounds(8, [4, 8, 12, 16]) == (4, 16)


def test_what_stays_is_a_prefix_of_the_order() -> None:
    order = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]])
    assert keep_uneven(order, [1, 3]) == {0: [3], 1: [0, 1, 2]}
    assert keep_uneven(order, [2, 4], groups=2) == {0: [1, 3], 1: [0, 1, 2, 3]}


def test_shares_are_of_the_layer_and_unknown_ones_alike() -> None:
    counts = torch.tensor([[30, 10, 0, 0], [0, 0, 0, 0]])
    stats = SimpleNamespace(counts_LE=counts)
    assert torch.equal(score_shares("frequency", stats), torch.tensor([[0.75, 0.25, 0, 0], [0.25] * 4]).double())
    assert torch.equal(score_shares("random", stats), torch.full((2, 4), 0.25).double())
    assert deal(score_shares("random", stats), 3, 1, 4) == [3, 3]


def test_every_criterion_but_random_has_a_score() -> None:
    assert {*SCORES, "random"} == {*CRITERIA}
