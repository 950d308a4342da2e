"""The swap search: finds planted improvements, keeps its rules and its budget, and repeats itself."""

import pytest
import torch

from moe_edge.models.views import moe_layers
from moe_edge.planning import search as module
from moe_edge.planning.scoring import masked_kl_rows
from moe_edge.planning.search import SwapRules, search, swaps
from tests.tiny import tiny_ids, tiny_model

DEAD = {0: [0, 4], 1: [1, 5], 2: [2, 3]}  # experts that put out nothing, by layer
LIVE = {layer: [expert for expert in range(6) if expert not in dead] for layer, dead in DEAD.items()}
BAD = {0: [0, 1, 2, 4], 1: [0, 1, 2, 5], 2: [0, 2, 3, 4]}  # keeps every dead one
BUDGET = 60_000


@pytest.fixture(scope="module")
def model():
    """Experts that matter, but for two in each layer. The router asks all of them alike."""
    made = tiny_model("mixtral", layers=3)
    with torch.no_grad():
        for view in moe_layers(made):
            view.experts.down_proj.mul_(3)
            view.experts.down_proj[DEAD[view.index]] = 0
    return made


@pytest.fixture(scope="module")
def ids():
    return tiny_ids(tokens=32, rows=24, seed=3)


def test_dead_experts_are_exchanged_and_unseen_rows_agree(model, ids):
    found = search(model, BAD, ids, budget_tokens=BUDGET)
    before, after = masked_kl_rows(model, [BAD, found.kept], tiny_ids(tokens=32, rows=16, seed=9)).mean(dim=1)
    assert after < 0.8 * before
    assert found.swapped >= 2 and found.sweeps >= 1
    assert all(ids == sorted(set(ids)) and len(ids) == 4 for ids in found.kept.values())


def test_without_a_budget_for_a_sweep_the_start_is_handed_back(model, ids):
    found = search(model, LIVE, ids, budget_tokens=1)
    assert found.kept == LIVE and found.swapped == 0 and found.sweeps == 0 and found.tokens == 0


@pytest.mark.parametrize("budget", [1_500, 20_000])
def test_the_budget_is_an_upper_bound_and_is_spent(model, ids, budget):
    found = search(model, BAD, ids, budget_tokens=budget)
    assert found.tokens <= budget
    if budget > 10_000:
        assert found.tokens > budget / 3


@pytest.mark.parametrize("rows", [2, 3, 24])
def test_the_rows_of_a_prediction_do_not_judge_it(model, monkeypatch, rows):
    predicted_on, tried_on = [], []
    predict, prepare = module.local_layers, module.TrialRows
    given = {"local_layers": (predicted_on, predict, 2), "TrialRows": (tried_on, prepare, 1)}
    for name, (seen, real, place) in given.items():
        watch = lambda *args, seen=seen, real=real, place=place, **kw: seen.append(args[place]) or real(*args, **kw)  # noqa: E731
        monkeypatch.setattr(module, name, watch)
    found = search(model, BAD, tiny_ids(tokens=16, rows=rows, seed=2), budget_tokens=20_000)
    assert found.sweeps >= 1 and len(predicted_on) == len(tried_on) == found.sweeps
    for predicted, tried in zip(predicted_on, tried_on, strict=True):
        assert not {tuple(row) for row in predicted.tolist()} & {tuple(row) for row in tried.tolist()}


def test_the_same_seed_finds_the_same_whatever_the_global_generator(model, ids):
    first = search(model, BAD, ids, budget_tokens=20_000, seed=4)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert first == search(model, BAD, ids, budget_tokens=20_000, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state), "and leaves it alone"


def test_guarded_experts_stay_and_groups_keep_their_counts(model, ids):
    start = {layer: [0, 1, 3, 4] for layer in range(3)}
    guard = {0: [0], 2: [3]}
    found = search(model, start, ids, budget_tokens=20_000, rules=SwapRules(groups=2, guard=guard))
    assert 0 in found.kept[0] and 3 in found.kept[2]
    assert all(sum(expert < 3 for expert in kept) == 2 for kept in found.kept.values())


def test_many_layers_are_tried_in_parts(model, ids, monkeypatch):
    assert module.layer_parts([0, 1, 2]) == [[0], [1], [2]]
    monkeypatch.setattr(module, "SINGLE_LAYERS", 2)
    assert module.layer_parts([0, 1, 2]) == [[0], [1, 2]]
    found = search(model, BAD, ids, budget_tokens=20_000)
    assert found.swapped >= 1


def test_only_its_own_rows_are_read(model, monkeypatch):
    seen = []
    real = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: seen.append(k["input_ids"]) or real(*a, **k))
    given = tiny_ids(tokens=16, rows=5, seed=1)
    search(model, BAD, given, budget_tokens=5_000)
    known = {tuple(row) for row in given.tolist()}
    assert seen and all(tuple(row) in known for batch in seen for row in batch.tolist())


def test_swaps_are_all_sets_that_differ_by_one():
    assert swaps([0, 2], [0, 2], [1, 3], 4) == [[1, 2], [2, 3], [0, 1], [0, 3]]
    assert swaps([0, 2], [0, 2], [1, 3], 2) == [[1, 2], [0, 3]]
    assert swaps([0, 2], [2], [1, 3], 4) == [[0, 1], [0, 3]]
    assert swaps([0, 1, 2, 3], [0, 1, 2, 3], [], 4) == []


def test_with_too_many_pairs_only_the_promising_ones_are_looked_at(model, ids, monkeypatch):
    """One expert to lose and one to win per layer is enough to get better."""
    monkeypatch.setattr(module, "SHORT_LIST", 1)
    sets = []
    real = module.swaps
    monkeypatch.setattr(module, "swaps", lambda *given: sets.append(real(*given)) or sets[-1])
    found = search(model, BAD, ids, budget_tokens=20_000)
    assert found.swapped >= 1 and all(len(each) == 1 for each in sets)
    before, after = masked_kl_rows(model, [BAD, found.kept], tiny_ids(tokens=32, rows=16, seed=9)).mean(dim=1)
    assert after < before
