"""A plan applied to a model: the model becomes what the plan says, or nothing happens."""

import pytest
import torch

from moe_edge.compression.surgery import apply_plan, check_plan
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.plan import Estimate, Plan
from moe_edge.families.pruning import masked
from moe_edge.families.views import moe_layers
from tests.tiny import FAMILY_NAMES, tiny_ids, tiny_model

KEPT = {0: [0, 2, 3, 5], 1: [1, 2, 3, 4]}


def plan_of(kept: dict[int, list[int]], **changes: object) -> Plan:
    """A plan for the tiny models (6 experts, top-2) that keeps 4 per layer."""
    estimate = Estimate(
        params_total=1, params_active=1, file_bytes=1, kv_cache_bytes=1, peak_memory_bytes=1, routed_expert_share_kept=1
    )
    values: dict[str, object] = {
        "criterion": "frequency", "experts_total": 6, "experts_kept": 4, "top_k": 2, "kept": kept,
        "quantization": "Q8_0", "onnx_precision": "int8", "predicted_kl_nats": 0.1, "estimate": estimate,
    }  # fmt: skip
    return Plan.model_validate(values | changes)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_student_is_what_the_plan_predicted(family: str) -> None:
    model, ids = tiny_model(family), tiny_ids()
    with masked(model, KEPT, 1), torch.no_grad():
        predicted = model(ids).logits
    apply_plan(model, plan_of(KEPT, top_k=1))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, predicted)
    assert [(view.count, view.top_k) for view in moe_layers(model)] == [(4, 1), (4, 1)]


@pytest.mark.parametrize("kept", [{}, {0: list(range(6)), 1: list(range(6))}])
def test_a_plan_that_drops_nothing_changes_no_bit(kept: dict[int, list[int]]) -> None:
    model, ids = tiny_model("qwen2_moe"), tiny_ids()
    with torch.no_grad():
        before = model(ids).logits
        apply_plan(model, plan_of(kept, experts_kept=6))
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("plan", "word"),
    [
        (plan_of(KEPT, experts_total=8), "8 experts per layer, the teacher has 6"),
        (plan_of({0: [0, 1, 2, 3]}), r"layers 0\.\.1, got \[0\]"),
        (plan_of({layer: [0, 1, 2, 3] for layer in range(3)}), r"got \[0, 1, 2\]"),
        (plan_of(KEPT, action="melt"), "unknown action 'melt'"),
    ],
)
def test_a_plan_for_another_model_is_refused(plan: Plan, word: str) -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ConfigError, match=word) as caught:
        apply_plan(model, plan)
    assert caught.value.exit_code == 2 and moe_layers(model)[0].count == 6


def test_a_fitting_plan_passes_without_a_model() -> None:
    assert check_plan(plan_of(KEPT), experts=6, layers=2) is None
