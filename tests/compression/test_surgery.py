"""A plan applied to a model: the model becomes what the plan says, or nothing happens."""

import pytest
import torch

from moe_edge.compression.surgery import apply_plan, check_plan
from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.contracts.plan import Plan
from moe_edge.models.pruning import masked
from moe_edge.models.views import moe_layers
from tests.compression.action_helpers import KEPT, ROWS, material, plan_of
from tests.tiny import ALL_FAMILIES, FAMILY_NAMES, tiny_ids, tiny_model


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
        (plan_of({0: [0, 1, 2, 3]}), r"layers \[0, 1\], got \[0\]"),
        (plan_of({layer: [0, 1, 2, 3] for layer in range(3)}), r"got \[0, 1, 2\]"),
    ],
)
def test_a_plan_for_another_model_is_refused(plan: Plan, word: str) -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ConfigError, match=word) as caught:
        apply_plan(model, plan)
    assert caught.value.exit_code == 2 and moe_layers(model)[0].count == 6


@pytest.mark.parametrize(
    "changes", [{"action": "merge", "compensate": True}, {"action": "shared-core", "shared_rank": 2}]
)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_action_knows_every_family(family: str, changes: dict[str, object]) -> None:
    model = tiny_model(family, layers=2 if changes.get("action") == "shared-core" else 3)
    views, given = moe_layers(model), material(model)
    kept = {view.index: [0, 1, 3, 4] for view in views}  # two of each group, where there are groups
    if changes.get("action") == "merge":
        changes = changes | {"merges": {view.index: {2: 0, 5: 1} for view in views}}
    plan = plan_of(kept, top_k=views[0].top_k, **changes)
    if family == "gpt_oss" and plan.action == "shared-core":
        with pytest.raises(InputRejected, match="GptOssExperts has biases"):
            apply_plan(model, plan, given)
        return
    applied = apply_plan(model, plan, given)
    with torch.no_grad():
        assert applied.model(ROWS).logits.isfinite().all()
    assert [record["layer"] for record in applied.layers] == [view.index for view in views]
    if plan.action != "shared-core":  # which may well be worse
        assert all(record["missed"] <= record["missed_after_dropping"] + 1e-5 for record in applied.layers)


def test_a_fitting_plan_passes_without_a_model() -> None:
    assert check_plan(plan_of(KEPT), experts=6, layers=[0, 1]) is None
