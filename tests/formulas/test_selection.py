"""Selection: orders, ties, missing evidence, diversity, groups, the guard, nesting and the random baseline."""

from itertools import combinations

import pytest
import torch

from moe_edge.formulas import saliency
from moe_edge.formulas.selection import (
    CRITERIA,
    expert_cka,
    keep_prefix,
    order_by_score,
    order_d_optimal,
    order_diverse,
    order_random,
    rank,
    select,
)
from tests.formulas.test_saliency import Sums

NAN = float("nan")
L, E = 3, 12


def random_stats(seed: int = 0, layers: int = L, experts: int = E) -> Sums:
    """Statistics of `layers` layers in which every expert saw tokens and HSIC is positive semidefinite."""
    generator = torch.Generator().manual_seed(seed)

    def row() -> torch.Tensor:
        return torch.rand(layers, experts, generator=generator, dtype=torch.float64) + 0.1

    features = torch.randn(layers, experts, 6, generator=generator, dtype=torch.float64)
    hsic = features @ features.mT
    counts = (row() * 100).long() + 1
    return Sums(
        counts, row(), row(), row(), row(), hsic, hsic.clone(), row(), counts // 2, row(), row() + 1, int(counts.sum())
    )


def test_higher_scores_come_first():
    score_LE = torch.tensor([[1.0, 4.0, 2.0, 3.0], [9.0, 0.0, 8.0, 0.0]])
    assert order_by_score(score_LE).tolist() == [[1, 3, 2, 0], [0, 2, 1, 3]]
    assert keep_prefix(order_by_score(score_LE), 2) == {0: [1, 3], 1: [0, 2]}


def test_ties_go_to_the_lower_id_and_nan_ranks_last():
    assert order_by_score(torch.tensor([[1.0, 1.0, 1.0, 1.0]])).tolist() == [[0, 1, 2, 3]]
    assert order_by_score(torch.tensor([[NAN, 0.0, NAN, 0.0]])).tolist() == [[1, 3, 0, 2]]
    assert order_by_score(torch.zeros(1, 64)).tolist() == [list(range(64))]


@pytest.mark.parametrize(("n_keep", "groups"), [(0, 1), (5, 1), (3, 2), (3, 3)])
def test_an_impossible_count_is_refused(n_keep, groups):
    with pytest.raises(ValueError, match="cannot keep"):
        keep_prefix(torch.arange(4)[None], n_keep, groups)


def test_a_copy_of_a_kept_expert_gives_way_to_a_different_one():
    """Scores 10, 9, 5: expert 1 copies expert 0, so what is left of 9 loses to 5 x (1 - .2) = 4."""
    cka = torch.tensor([[[1.0, 1.0, 0.2], [1.0, 1.0, 0.2], [0.2, 0.2, 1.0]]])
    score = torch.tensor([[10.0, 9.0, 5.0]])
    assert order_by_score(score).tolist() == [[0, 1, 2]]
    assert order_diverse(score, cka).tolist() == order_d_optimal(score, cka).tolist() == [[0, 2, 1]]


def test_among_copies_the_score_decides():
    cka = torch.ones(1, 4, 4)
    score = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    assert order_diverse(score, cka).tolist() == order_d_optimal(score, cka).tolist() == [[1, 2, 3, 0]]


def test_the_largest_similarity_to_the_kept_set_counts():
    """After 0 and 1 are kept, 2 resembles 1 (.9) and 3 nobody (.5): 4 x .1 < 1 x .5."""
    cka = torch.eye(4)[None].clone()
    cka[0, 1, 2] = cka[0, 2, 1] = 0.9
    cka[0, 0, 3] = cka[0, 3, 0] = cka[0, 1, 3] = cka[0, 3, 1] = 0.5
    assert order_diverse(torch.tensor([[10.0, 9.0, 4.0, 1.0]]), cka).tolist() == [[0, 1, 3, 2]]


def test_what_several_explain_together_counts_for_d_optimality():
    """Expert 2 is the sum of 0 and 1: similar to each by .71 only, and wholly explained by both."""
    features = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0.5**0.5, 0.5**0.5, 0], [0.6, 0, 0.8]])
    cka = (features @ features.T)[None]
    score = torch.tensor([[10.0, 9.0, 8.0, 2.0]])
    assert order_diverse(score, cka).tolist() == [[0, 1, 2, 3]]
    assert order_d_optimal(score, cka).tolist() == [[0, 1, 3, 2]]


def test_each_d_optimal_step_raises_the_determinant_most():
    stats = random_stats(experts=6)
    score_LE, cka_LEE = saliency.ean(stats), expert_cka(stats)
    for score_E, cka_EE, order in zip(score_LE, cka_LEE, order_d_optimal(score_LE, cka_LEE).tolist(), strict=True):
        kernel = score_E[:, None] * cka_EE * score_E
        for size in range(1, 6):
            chosen = order[: size - 1]
            free = [expert for expert in range(6) if expert not in chosen]
            gains = {expert: float(torch.logdet(kernel[[*chosen, expert]][:, [*chosen, expert]])) for expert in free}
            assert order[size - 1] == max(gains, key=gains.__getitem__)


def test_no_evidence_never_makes_an_expert_redundant():
    """A NaN similarity says nothing, a negative (debiased) one is no similarity."""
    cka = torch.tensor([[[1.0, NAN, 0.5], [NAN, NAN, NAN], [0.5, NAN, 1.0]]])
    assert order_diverse(torch.tensor([[10.0, 4.0, 7.0]]), cka).tolist() == [[0, 1, 2]]
    assert order_d_optimal(torch.tensor([[10.0, 6.5, 7.0]]), cka).tolist() == [[0, 1, 2]]
    cka = torch.tensor([[[1.0, -0.3, 0.5], [-0.3, 1.0, 0.0], [0.5, 0.0, 1.0]]])
    assert order_diverse(torch.tensor([[10.0, 4.0, 7.0]]), cka).tolist() == [[0, 1, 2]]


def test_an_unrouted_expert_has_no_cka_and_is_kept_last():
    """Functional HSIC may exist for it: every expert runs on the CKA tokens. It is still no evidence of use."""
    stats = Sums()
    cka = expert_cka(stats)
    assert torch.isnan(cka[0, 3]).all() and torch.isnan(cka[0, :, 3]).all() and float(cka[0, 0, 1]) == 0
    for name in CRITERIA:
        if name not in ("random", "aimer"):
            assert rank(name, stats)[0, -1] == 3, name


def test_diversity_without_any_cka_is_plain_saliency():
    stats = Sums(gated_hsic_LEE=torch.zeros(1, 4, 4))
    for name in ("cka-diverse", "cka-dopt"):
        assert rank(name, stats).tolist() == order_by_score(saliency.ean(stats)).tolist()


def test_random_is_seeded_and_differs_between_layers():
    first = order_random(8, 16, seed=1)
    assert torch.equal(first, order_random(8, 16, seed=1)) and not torch.equal(first, order_random(8, 16, seed=2))
    assert len({tuple(row) for row in first.tolist()}) > 1


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_orders_all_experts_and_repeats_itself(name):
    stats = random_stats()
    order = rank(name, stats, seed=3)
    assert torch.equal(order, rank(name, stats, seed=3)) and order.dtype == torch.int64
    assert torch.equal(order.sort(dim=1).values, torch.arange(E).expand(L, E))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", CRITERIA)
def test_plans_of_a_criterion_are_nested(name, groups):
    stats = random_stats(1)
    guard = torch.zeros(L, E, dtype=torch.bool)
    guard[0, 5] = True
    plans = [select(name, stats, count, 7, groups=groups, guard_LE=guard) for count in range(groups, E + 1, groups)]
    for smaller, larger in zip(plans[:-1], plans[1:], strict=True):
        assert all(set(smaller[layer]) < set(larger[layer]) for layer in range(L))
        assert all(ids == sorted(set(ids)) for ids in smaller.values())


def test_groups_keep_equal_counts_and_their_own_best():
    order = torch.tensor([[0, 1, 2, 5, 3, 4], [5, 4, 3, 2, 1, 0]])
    assert keep_prefix(order, 4, groups=2) == {0: [0, 1, 3, 5], 1: [1, 2, 4, 5]}
    assert keep_prefix(order, 2, groups=2) == {0: [0, 5], 1: [2, 5]}
    assert keep_prefix(order, 4) == {0: [0, 1, 2, 5], 1: [2, 3, 4, 5]}


@pytest.mark.parametrize("name", CRITERIA)
def test_the_guard_keeps_super_experts_under_every_criterion_but_random(name):
    stats, guard = random_stats(2), torch.zeros(L, E, dtype=torch.bool)
    worst = rank(name, stats)[:, -1]
    guard[torch.arange(L), worst] = True
    kept = select(name, stats, 2, guard_LE=guard)
    assert all((int(worst[layer]) in kept[layer]) == (name != "random") for layer in range(L))
    unguarded = [expert for expert in rank(name, stats)[0].tolist() if expert != int(worst[0])]
    order = rank(name, stats, guard_LE=guard)[0].tolist()
    assert [expert for expert in order if expert != int(worst[0])] == unguarded, "the others keep their order"


def test_a_guard_larger_than_the_count_keeps_the_best_of_the_guarded():
    guard = torch.tensor([[True, True, True, False]])
    assert select("man", Sums(), 2, guard_LE=guard) == {0: [0, 1]}


def test_the_criteria_of_the_issue_are_there():
    wanted = "msan man reap ean frequency gate-mass loo-mse aimer cka-diverse cka-dopt random"
    assert set(wanted.split()) <= set(CRITERIA)


def test_the_d_optimal_greedy_is_close_to_the_best_set():
    """Against all sets of three of six."""
    stats = random_stats(5, layers=1, experts=6)
    score, cka = saliency.ean(stats), expert_cka(stats)
    kernel = score[0][:, None] * cka[0] * score[0]
    values = {ids: float(torch.det(kernel[list(ids)][:, list(ids)])) for ids in combinations(range(6), 3)}
    chosen = tuple(keep_prefix(order_d_optimal(score, cka), 3)[0])
    assert values[chosen] >= 0.6 * max(values.values())
