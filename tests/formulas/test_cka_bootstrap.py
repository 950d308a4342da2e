"""The bootstrap covers the truth about as often as it says, the null is zero, and groups share blocks evenly."""

import math

import pytest
import torch
from torch import Tensor

from moe_edge.formulas.cka import cka_from_hsic, gram, hsic_from_grams, normalise_rows
from moe_edge.formulas.cka_bootstrap import cka_ci, group_count, group_of, hsic_and_null, mean_cka, mean_cka_ci


def _blocks(blocks: int, experts: int, tokens: int, shared: float, seed: int) -> Tensor:
    """HSIC sums per block of experts whose features are `shared` parts common and the rest independent."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(blocks):
        common = torch.randn(1, tokens, 8, generator=generator)
        own = torch.randn(experts, tokens, 8, generator=generator)
        found.append(hsic_from_grams(gram(normalise_rows(shared * common + (1 - shared) * own))))
    return torch.stack(found)


@pytest.mark.parametrize(("blocks", "groups"), [(0, 1), (1, 1), (5, 5), (16, 16), (32, 16), (37, 16)])
def test_groups_are_consecutive_and_even(blocks: int, groups: int) -> None:
    assert group_count(blocks) == groups
    found = [group_of(block, blocks) for block in range(blocks)]
    assert found == sorted(found)
    sizes = [found.count(group) for group in range(groups)] if blocks else []
    assert not blocks or max(sizes) - min(sizes) <= 1


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = float(mean_cka(_blocks(400, 4, 48, 0.5, seed=1).sum(0)))
    inside = pairs = 0
    for seed in range(40):
        groups = _blocks(16, 4, 48, 0.5, seed=100 + seed)
        low, high = mean_cka_ci(groups, draws=200) or (math.nan, math.nan)
        assert low < float(mean_cka(groups.sum(0))) < high
        inside += low <= truth <= high
        bounds = cka_ci(groups, draws=200)
        assert bounds is not None
        pairs += int(((bounds[0] <= truth) & (truth <= bounds[1]))[0, 1])
    assert inside >= 33 and pairs >= 33  # of 40; 95 % with 16 groups


def test_the_interval_of_a_pair_equals_a_slow_bootstrap() -> None:
    groups = _blocks(6, 3, 24, 0.4, seed=3)
    bounds = cka_ci(groups, draws=50, seed=9)
    chosen = torch.randint(6, (50, 6), generator=torch.Generator().manual_seed(9))
    values = torch.stack([cka_from_hsic(groups[row].sum(0)) for row in chosen])
    assert bounds is not None
    torch.testing.assert_close(bounds[0], values.quantile(0.025, dim=0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bounds[1], values.quantile(0.975, dim=0), rtol=1e-9, atol=1e-9)
    means = torch.stack([value[~torch.eye(3, dtype=torch.bool)].mean() for value in values])
    low, high = mean_cka_ci(groups, draws=50, seed=9) or (0.0, 0.0)
    assert (low, high) == pytest.approx((float(means.quantile(0.025)), float(means.quantile(0.975))))


def test_no_evidence_stays_no_evidence() -> None:
    groups = _blocks(8, 3, 24, 0.5, seed=4)
    groups[:, 1], groups[:, :, 1] = 0.0, 0.0
    low, high = cka_ci(groups) or (torch.zeros(0), torch.zeros(0))
    assert low[1].isnan().all() and high[:, 1].isnan().all() and low[0, 2].isfinite()
    known = torch.tensor([True, False, True])
    assert float(mean_cka(groups.sum(0))) == pytest.approx(float(mean_cka(groups.sum(0), known)))
    assert mean_cka(torch.zeros(3, 3)).isnan()
    assert cka_ci(groups[:3]) is None and mean_cka_ci(torch.zeros(8, 3, 3)) is None


def test_the_shuffled_null_equals_its_definition_and_averages_to_zero() -> None:
    features = normalise_rows(torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0)) + 0.5)
    features[2] = features[0]
    grams = gram(features)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(7))
    both = hsic_from_grams(gram(torch.cat([features, features[:, order]])))
    hsic, null = hsic_and_null(grams, 7)
    torch.testing.assert_close(null, both[:3, 3:], rtol=1e-5, atol=1e-9)
    assert torch.equal(hsic, hsic_from_grams(grams))
    nulls = torch.stack([hsic_and_null(grams, seed)[1] for seed in range(200)])
    cka = mean_cka(nulls.mean(0), variance_E=hsic.diagonal())
    assert abs(float(cka)) < 0.01 and float(cka_from_hsic(hsic)[0, 2]) == pytest.approx(1.0, abs=1e-5)
    assert not torch.stack(hsic_and_null(grams[:, :3, :3], 0)).any()
