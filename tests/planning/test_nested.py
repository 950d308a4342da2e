"""Nested plans: what stays at 50 % also stays at 75 %, for a criterion by construction (all of them: test_curve.py) and for a
search on request."""

from pathlib import Path

import pytest
import torch

from moe_edge.contracts.artifacts import ProfileFolder
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.plan import Plan
from moe_edge.models.loading import load_model
from moe_edge.planning.candidates import Candidates
from moe_edge.planning.search import SwapRules, search
from moe_edge.texts.recipes import named_files
from tests.planning.plan_helpers import config
from tests.stages.inputs import EXPERTS, LAYERS, plain_statistics, run_plan, write_profile
from tests.tiny import tiny_checkpoint, tiny_ids


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher"), "qwen3_moe", experts=EXPERTS, layers=LAYERS)


def is_nested(small: dict, large: dict) -> bool:
    return all(set(small[layer]) < set(large[layer]) for layer in range(LAYERS))


@pytest.mark.parametrize("criterion", ["cka-diverse", "random"])
def test_plans_of_one_criterion_are_nested(teacher, tmp_path, criterion):
    half, most = (
        run_plan(teacher, tmp_path / str(share), f"plan.criterion={criterion}", f"plan.experts={share}")[1].kept
        for share in (0.5, 0.75)
    )
    assert [len(half[0]), len(most[0])] == [4, 6] and is_nested(half, most)


def other_order(folder: Path) -> ProfileFolder:
    """A profile whose order is the reverse, so that no choice is nested by chance."""
    stats = plain_statistics()
    for name in ("counts_LE", "gate_sum_LE", "norm_sum_LE", "gated_norm_sum_LE"):
        getattr(stats, name).copy_(getattr(stats, name).flip(1).clone())
    return write_profile(folder, stats)


@pytest.mark.parametrize("criterion", ["auto", "random"])
def test_within_an_earlier_plan_only_its_experts_may_stay(teacher, tmp_path, criterion):
    """Also for what the search finds and under another criterion, profile and seed."""
    _, large = run_plan(teacher, tmp_path / "large", "plan.criterion=frequency", "plan.experts=0.75")
    within = f"plan.within={tmp_path / 'large' / 'plan.json'}"
    profile = other_order(tmp_path / "profile")
    settings = (f"plan.criterion={criterion}", "plan.experts=0.5", "plan.seed=3", "plan.search_tokens=4000")
    _, free = run_plan(teacher, tmp_path / "free", *settings, profile=profile)
    _, small = run_plan(teacher, tmp_path / "small", *settings, within, profile=profile)
    assert not is_nested(free.kept, large.kept) and is_nested(small.kept, large.kept)
    assert ("search" in {c.criterion for c in small.candidates}) == (criterion == "auto")


def test_the_search_never_leaves_what_it_may_keep(teacher):
    model, ids = load_model(teacher), tiny_ids(tokens=16, rows=24, vocab=300)
    allowed, start = [0, 1, 2, 4, 6, 7], dict.fromkeys(range(LAYERS), [0, 1, 2, 4])
    for seed in range(3):
        rules = SwapRules(within=dict.fromkeys(range(LAYERS), allowed))
        found = search(model, start, ids, budget_tokens=20_000, rules=rules, seed=seed)
        assert all(set(kept) <= set(allowed) for kept in found.kept.values())
        again = search(model, start, ids, budget_tokens=20_000, seed=seed)
        if again.swapped:
            break
    assert again.swapped, "free to swap, it does"


def test_allowed_experts_come_first_also_before_guarded_ones():
    stats = plain_statistics()
    largest = torch.ones(LAYERS, EXPERTS, dtype=torch.float64)
    largest[0, 7] = 100.0  # a super expert that an earlier plan has dropped
    stats.norm_max_LE.copy_(largest)
    within = dict.fromkeys(range(LAYERS), [1, 2, 3, 5])
    chosen = Candidates(stats, range(LAYERS), within=within)
    assert chosen.kept("frequency", 3) == dict.fromkeys(range(LAYERS), [1, 2, 3]) and chosen.guard == {}
    assert chosen.kept("frequency", 5)[1] == [0, 1, 2, 3, 5]


def test_a_wrong_earlier_plan_is_a_config_error(teacher, tmp_path):
    _, plan = run_plan(teacher, tmp_path / "a", "plan.criterion=frequency")
    path = tmp_path / "a" / "plan.json"
    with pytest.raises(ConfigError, match="of the 5 that an earlier plan kept"):
        run_plan(teacher, tmp_path / "b", "plan.experts=6", f"plan.within={path}")
    with pytest.raises(ConfigError, match="cannot be read"):
        run_plan(teacher, tmp_path / "c", f"plan.within={tmp_path / 'none.json'}")
    other = tmp_path / "other.json"
    other.write_text(Plan.model_validate(plan.model_dump(by_alias=True) | {"experts_total": 9}).to_json())
    with pytest.raises(ConfigError, match="belongs to another model"):
        run_plan(teacher, tmp_path / "d", f"plan.within={other}")


def test_another_earlier_plan_is_another_build(teacher, tmp_path):
    _, plan = run_plan(teacher, tmp_path / "a", "plan.criterion=frequency")
    path = tmp_path / "a" / "plan.json"
    first = named_files(config(f"plan.within={path}"))["plan"]
    path.write_text(plan.model_copy(update={"criterion": "by hand"}).to_json())
    assert first != named_files(config(f"plan.within={path}"))["plan"] and named_files(config())["plan"] == {}
