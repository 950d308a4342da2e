"""Selection: ties, missing evidence, diversity and the random baseline."""

import pytest
import torch

from moe_edge.formulas import saliency
from moe_edge.formulas.selection import CRITERIA, keep_diverse, keep_highest, keep_random, select
from tests.formulas.test_saliency import Sums

NAN = float("nan")


def test_the_highest_scores_stay_per_layer_in_ascending_order():
    score_LE = torch.tensor([[1.0, 4.0, 2.0, 3.0], [9.0, 0.0, 8.0, 0.0]])
    assert keep_highest(score_LE, 2) == {0: [1, 3], 1: [0, 2]}


def test_ties_go_to_the_lower_id_and_nan_ranks_last():
    assert keep_highest(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), 2) == {0: [0, 1]}
    assert keep_highest(torch.tensor([[NAN, 0.0, NAN, 0.0]]), 2) == {0: [1, 3]}
    many = torch.zeros(1, 64)
    assert keep_highest(many, 32) == {0: list(range(32))}


@pytest.mark.parametrize("n_keep", [0, 5])
def test_an_impossible_count_is_refused(n_keep):
    with pytest.raises(ValueError, match="cannot keep"):
        keep_highest(torch.ones(1, 4), n_keep)
    with pytest.raises(ValueError, match="cannot keep"):
        keep_random(1, 4, n_keep, 0)


def test_a_copy_of_a_kept_expert_gives_way_to_a_different_one():
    """Scores 10, 9, 5: expert 1 copies expert 0, so 9 x (1 - 1) = 0 loses to 5 x (1 - .2) = 4."""
    cka = torch.tensor([[[1.0, 1.0, 0.2], [1.0, 1.0, 0.2], [0.2, 0.2, 1.0]]])
    score = torch.tensor([[10.0, 9.0, 5.0]])
    assert keep_highest(score, 2) == {0: [0, 1]}
    assert keep_diverse(score, cka, 2) == {0: [0, 2]}
    assert keep_diverse(score, cka, 3) == {0: [0, 1, 2]}


def test_the_largest_similarity_to_the_kept_set_counts():
    """After 0 and 1 are kept, 2 resembles 1 (.9) and 3 nobody (.5): 4 x .1 < 1 x .5."""
    cka = torch.eye(4)[None].clone()
    cka[0, 1, 2] = cka[0, 2, 1] = 0.9
    cka[0, 0, 3] = cka[0, 3, 0] = cka[0, 1, 3] = cka[0, 3, 1] = 0.5
    assert keep_diverse(torch.tensor([[10.0, 9.0, 4.0, 1.0]]), cka, 3) == {0: [0, 1, 3]}


def test_no_evidence_never_makes_an_expert_redundant():
    """A NaN similarity is distance 1, a negative (debiased) one is too."""
    cka = torch.tensor([[[1.0, NAN, 0.5], [NAN, NAN, NAN], [0.5, NAN, 1.0]]])
    assert keep_diverse(torch.tensor([[10.0, 4.0, 7.0]]), cka, 2) == {0: [0, 1]}
    cka = torch.tensor([[[1.0, -0.3, 0.5], [-0.3, 1.0, 0.0], [0.5, 0.0, 1.0]]])
    assert keep_diverse(torch.tensor([[10.0, 4.0, 7.0]]), cka, 2) == {0: [0, 1]}


def test_diversity_without_any_cka_is_plain_saliency():
    stats = Sums(gated_hsic_LEE=torch.zeros(1, 4, 4))
    assert select("cka-diverse", stats, 2) == keep_highest(saliency.ean(stats), 2)


def test_random_is_seeded_differs_between_layers_and_is_nested():
    first = keep_random(8, 16, 6, seed=1)
    assert first == keep_random(8, 16, 6, seed=1) != keep_random(8, 16, 6, seed=2)
    assert len({tuple(ids) for ids in first.values()}) > 1
    larger = keep_random(8, 16, 10, seed=1)
    assert all(set(first[layer]) <= set(larger[layer]) for layer in first)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_keeps_ascending_ids_and_repeats_itself(name):
    kept = select(name, Sums(), 2, seed=3)
    assert kept == select(name, Sums(), 2, seed=3)
    assert list(kept) == [0] and len(kept[0]) == 2 and kept[0] == sorted(set(kept[0]))
    if name != "random":
        assert 3 not in kept[0], "the expert without tokens is the first to go"


def test_the_criteria_of_the_issue_are_there():
    assert {"frequency", "ean", "msan", "reap", "cka-diverse", "random"} <= set(CRITERIA)
