"""Plans refuse contradictions; quantization recipes pin every class and fall back where rows do not divide."""

import pytest
from pydantic import ValidationError

from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.plan import Plan
from moe_edge.contracts.quantization import ALWAYS_F32, GGML_TYPES, RECIPE_ORDER, RECIPES, pinned_type, tensor_bytes


def plan(**changes):
    estimate = dict(
        params_total=1,
        params_active=1,
        file_bytes=1,
        kv_cache_bytes=1,
        peak_memory_bytes=1,
        routed_expert_share_kept=0.5,
    )
    fields = dict(
        criterion="ean", experts_total=4, experts_kept=2, top_k=2, kept={0: [0, 3], 1: [1, 2]}, quantization="Q4_K_M",
        onnx_precision="int4", predicted_kl_nats=0.1, estimate=estimate,
    )  # fmt: skip
    return Plan.model_validate(fields | changes)


def test_plan_round_trips(tmp_path):
    (tmp_path / "plan.json").write_text(plan().to_json())
    assert Plan.read(tmp_path / "plan.json") == plan() and plan().prunes


@pytest.mark.parametrize(
    ("changes", "alters", "fits"),
    [
        ({}, True, False),
        ({"action": "merge", "merges": {0: {1: 0, 2: 3}, 1: {0: 1}}}, True, True),
        ({"action": "merge"}, True, False),
        ({"action": "shared-core", "shared_rank": 4}, True, True),
        ({"experts_kept": 4, "kept": {}}, False, False),
        ({"experts_kept": 4, "kept": {}, "expert_width": 64}, True, False),
        ({"experts_kept": 4, "kept": {}, "compensate": True}, False, True),
        ({"experts_kept": 4, "kept": {}, "action": "dense"}, True, True),
    ],
)
def test_a_plan_knows_what_it_changes_and_whether_it_is_fitted(tmp_path, changes, alters, fits):
    given = plan(**changes)
    assert (given.alters, given.fits) == (alters, fits)
    (tmp_path / "plan.json").write_text(given.to_json())
    assert Plan.read(tmp_path / "plan.json") == given


@pytest.mark.parametrize(
    "changes",
    [
        {"kept": {0: [0]}},
        {"kept": {0: [3, 0]}},
        {"kept": {0: [1, 1]}},
        {"kept": {0: [0, 4]}},
        {"top_k": 3},
        {"experts": 1},
        {"action": "melt"},
        {"merges": {0: {1: 0}}},  # not the action merge
        {"action": "merge", "merges": {0: {3: 0}}},  # from a kept expert
        {"action": "merge", "merges": {0: {1: 2}}},  # into a dropped one
        {"action": "merge", "merges": {2: {1: 0}}},  # an unknown layer
        {"action": "merge", "merges": {0: {4: 0}}},  # an unknown expert
        {"expert_width": 0},
        {"expert_width": 48},
        {"shared_rank": 4},
        {"action": "shared-core", "shared_rank": 0},
        {"action": "shared-core", "compensate": True},
        {"action_tokens": 0},
    ],
)
def test_contradictions_are_refused(changes):
    with pytest.raises(ValidationError):
        plan(**changes)


def test_fallbacks_follow_the_row_length():
    assert pinned_type("Q4_K_M", "expert_gate", 512) == "Q4_K"
    assert pinned_type("Q4_K_M", "expert_gate", 576) == "Q5_0"  # 576 = 18 * 32, not a multiple of 256
    assert pinned_type("Q6_K", "head", 576) == "Q8_0"
    assert pinned_type("Q4_K_M", "expert_gate", 33) == "F16"


def test_routers_and_norms_stay_f32():
    assert {pinned_type("Q2_K", name, 256) for name in ALWAYS_F32} == {"F32"}


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ConfigError, match="Q4_K_M"):
        pinned_type("Q4_K_XXL", "head", 256)


def test_bytes_are_blocks():
    assert tensor_bytes("Q4_K", (3, 512)) == 3 * 2 * 144
    assert tensor_bytes("F16", (5, 7)) == 70


def test_every_recipe_names_known_types():
    assert set(RECIPE_ORDER) <= set(RECIPES)
    assert {kind for classes in RECIPES.values() for kind in classes.values()} <= set(GGML_TYPES)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": "moe-edge/plan@99"}, "schema"),
        ({"quantization": "Q9_X"}, "unknown recipe 'Q9_X', known: F32"),
        ({"onnx_precision": "int3"}, "onnx_precision"),
        ({"top_k": 0}, "top_k"),
        ({"experts_total": -4}, "experts_total"),
    ],
)
def test_a_plan_of_another_version_type_or_precision_is_refused(change, named):
    with pytest.raises(ValidationError, match=named):
        plan(**change)
