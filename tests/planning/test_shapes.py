"""Top-k and width as variables: short ladders, what a family forbids, and what a budget of speed makes of them."""

import pytest

from moe_edge.contracts.errors import ConfigError, InfeasibleError
from moe_edge.planning.allocation import header_plan
from moe_edge.planning.headers import model_headers
from moe_edge.planning.shapes import Shape, at_shape, shapes_of
from tests.planning.plan_helpers import NO_SHARE, config, headers

SHORT = ("target.context_length=64", "target.runtime.kv_cache=f16")  # so that the cache is no way out
BOTH = ("plan.top_k=auto", "plan.expert_width=auto")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return headers(tmp_path_factory.mktemp("teacher"), experts=8, top_k=4, width=256)


def shapes(folder, *settings, family="qwen3_moe", **sizes):
    found = headers(folder, family, **sizes)
    return shapes_of(model_headers(found).spec, config(*settings), found)


def test_keep_and_numbers_are_one_shape(tmp_path):
    assert shapes(tmp_path / "a", "plan.expert_width=keep") == [Shape(2, None)]
    assert shapes(tmp_path / "d", "plan.experts=4") == [Shape(2, None)], "a count of experts means whole ones"
    assert shapes(tmp_path / "e", "plan.action=dense") == [Shape(2, None)], "no masking predicts what it costs"
    assert shapes(tmp_path / "b", "plan.top_k=1", "plan.expert_width=128") == [Shape(1, 128)]
    assert shapes(tmp_path / "c", "plan.expert_width=256") == [Shape(2, None)], "the teacher's own width"


def test_auto_is_a_ladder_the_least_change_first(tmp_path):
    found = shapes(tmp_path / "a", *BOTH, top_k=4)
    assert found[0] == Shape(4, None) and found[-1] == Shape(1, 128)
    assert {shape.top_k for shape in found} == {4, 3, 2, 1} and {shape.width for shape in found} == {None, 192, 128}
    work = [shape.top_k * (shape.width or 256) for shape in found]
    assert work == sorted(work, reverse=True) and len(found) == 12
    wide = shapes(tmp_path / "b", "plan.expert_width=auto", width=768)
    assert [shape.width for shape in wide] == [None, 512, 256], "K-quants want multiples of 256"


def test_what_a_family_forbids_is_not_on_the_ladder(tmp_path):
    assert {shape.top_k for shape in shapes(tmp_path, "plan.top_k=auto", family="phimoe")} == {2}
    fixed = shapes(tmp_path, "plan.expert_width=auto", family="ernie4_5_moe", width=64)
    assert {shape.width for shape in fixed} == {None}, "its shared experts take their size from the same key"


@pytest.mark.parametrize("action", ["dense", "shared-core"])
def test_auto_needs_an_action_that_masking_predicts(tmp_path, action):
    with pytest.raises(ConfigError, match="auto does not go with") as caught:
        shapes(tmp_path, f"plan.action={action}", "plan.top_k=auto")
    assert caught.value.exit_code == 2 and "plan.top_k=keep" in caught.value.next_command


def test_a_shape_is_the_configuration_that_asks_for_it(teacher):
    spec, resolved = model_headers(teacher).spec, config(*BOTH)
    asked = at_shape(resolved, spec, Shape(3, 128)).plan
    assert (asked.top_k, asked.expert_width) == (3, 128)
    kept = at_shape(resolved, spec, Shape(4, None)).plan
    assert (kept.top_k, kept.expert_width) == ("keep", "keep")


def solve(teacher, *settings, target="mobile"):
    return header_plan(teacher, config(*settings, target=target))


def speed_at(teacher, top_k):
    """What the smallest type reaches with all experts at a top-k, tokens per second."""
    return solve(teacher, *SHORT, f"plan.top_k={top_k}", "plan.bits=Q2_K").choice.estimate.decode_tokens_per_s


def test_every_shape_that_fits_is_an_answer(teacher):
    answer = solve(teacher, *BOTH, NO_SHARE, "plan.experts=0.5", target="cpu")
    assert answer.space.shape == (4, None) and len(answer.others) == 11
    assert all(other.choice.fits and other.space.shape == other.choice.shape for other in answer.others)
    sizes = {other.space.width: other.choice.estimate.file_bytes for other in (answer, *answer.others)}
    assert sizes[None] > sizes[192] > sizes[128]


def test_under_a_share_narrower_experts_may_be_more(teacher):
    answer = solve(teacher, "plan.expert_width=auto", target="cpu")
    kept = {other.space.width: other.choice.experts for other in (answer, *answer.others)}
    assert kept == {None: 5, 192: 6, 128: 8}
    assert all(o.choice.estimate.routed_expert_share_kept <= 0.625 for o in (answer, *answer.others))


def test_where_nothing_need_change_nothing_else_is_tried(teacher):
    assert solve(teacher, *BOTH).others == ()


def test_a_speed_that_only_a_lower_top_k_reaches_is_refused_with_that_top_k(teacher):
    least = (speed_at(teacher, 3) + speed_at(teacher, 2)) / 2
    wanted = (*SHORT, "plan.expert_width=keep", "plan.bits=Q2_K", f"target.budget.decode_tokens_per_s={least}")
    with pytest.raises(InfeasibleError, match="at top-2 this would meet every budget") as caught:
        solve(teacher, *wanted)
    assert caught.value.exit_code == 3 and "--set plan.top_k=2" in caught.value.next_command
    assert solve(teacher, *wanted, "plan.top_k=2").choice.fits
    answer = solve(teacher, *wanted, *BOTH)
    assert all(o.space.shape != (4, None) and o.choice.fits for o in (answer, *answer.others))
    with pytest.raises(InfeasibleError, match="no top-k reaches") as caught:
        solve(teacher, *SHORT, "target.budget.decode_tokens_per_s=1e9")
    assert "this would meet" not in str(caught.value)


def test_with_auto_a_count_below_the_teachers_top_k_is_possible(teacher):
    with pytest.raises(ConfigError, match="exceeds the 2 kept experts"):
        solve(teacher, "plan.experts=2")
    answer = solve(teacher, "plan.experts=2", "plan.top_k=auto")
    assert answer.choice.experts == 2 and answer.space.top_k == 2
