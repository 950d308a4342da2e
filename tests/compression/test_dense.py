"""dense: the student is what a sum with constant gates computes; with all experts at equal gates it is the teacher."""

import pytest
import torch

from moe_edge.compression.surgery import apply_plan
from moe_edge.models.dense import DENSE_OF
from moe_edge.models.views import expert_outputs, moe_layers
from tests.compression.action_helpers import KEPT, ROWS, kl_nats, log_probabilities, material, plan_of
from tests.tiny import FAMILY_NAMES, tiny_ids, tiny_model

ALL = {0: list(range(6)), 1: list(range(6))}


@torch.no_grad()
def at_constant_gates(family: str, top_k: int, **options: object):
    """Every router row zero: softmax gives every expert 1/6; with a shared gate at 1/2."""
    model = tiny_model(family, top_k=top_k, **options)
    for view in moe_layers(model):
        view.router.weight.zero_()
        if hasattr(view.block, "shared_expert_gate"):
            view.block.shared_expert_gate.weight.zero_()
    return model


@pytest.mark.parametrize(
    ("family", "tied"),
    [("qwen3_moe", True), ("qwen2_moe", False), ("qwen2_moe", True), ("mixtral", False), ("olmoe", True)],
)
def test_all_experts_at_constant_gates_are_the_teacher(family, tied):
    model = at_constant_gates(family, top_k=6, tied=tied)
    teacher = log_probabilities(model)
    student = apply_plan(model, plan_of(ALL, experts_kept=6, top_k=6, action="dense"), material(model)).model
    fresh = tiny_ids(rows=2, seed=4)
    with torch.no_grad():
        assert torch.allclose(student(ROWS).logits.double().log_softmax(-1), teacher, atol=1e-4)
        assert student(fresh).logits.isfinite().all()
    assert student.config.model_type == DENSE_OF.get(family, family)
    widths = {len(layer.mlp.up_proj.weight) for layer in student.model.layers} if family in DENSE_OF else {6 * 32}
    assert widths == {6 * 32 + (48 if family == "qwen2_moe" else 0)}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_dense_layer_is_the_weighted_sum_of_the_kept_experts(family):
    model, reference = tiny_model(family), tiny_model(family)
    applied = apply_plan(model, plan_of(KEPT, action="dense"), material(model))
    hidden_TD = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    view = moe_layers(reference)[0]
    with torch.no_grad():
        outputs_eTD = expert_outputs(view, hidden_TD, KEPT[0])
        mlp = applied.model.model.layers[0].mlp
        answer_TD = mlp(hidden_TD if family in DENSE_OF else hidden_TD[None]).reshape(40, 64)
        if family == "qwen2_moe":
            outputs_eTD = torch.cat([outputs_eTD, view.shared(hidden_TD)[None]])
        shares = torch.linalg.lstsq(outputs_eTD.flatten(1).T.double(), answer_TD.flatten().double()).solution
    assert torch.allclose(answer_TD.double(), torch.einsum("e,etd->td", shares, outputs_eTD.double()), atol=1e-4)
    assert (shares > 0).all() and (shares < 1.5).all()
    for record in applied.layers:
        assert record["missed"] <= record["missed_at_mean_gates"]


@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_and_width_compose(top_k):
    model = tiny_model("qwen3_moe", width=64)
    plan = plan_of(KEPT, action="dense", top_k=top_k, expert_width=32, compensate=True, sequential=True)
    applied = apply_plan(model, plan, material(model))
    assert applied.model.model.layers[0].mlp.up_proj.weight.shape == (4 * 32, 64)
    assert not applied.down_energy and len(applied.layers) == 2
    with torch.no_grad():
        assert applied.model(ROWS).logits.isfinite().all()


def test_refits_bring_the_dense_student_nearer():
    models = [tiny_model("qwen2_moe") for _ in range(2)]
    teacher = log_probabilities(models[0])
    plans = [plan_of(KEPT, action="dense", compensate=compensate) for compensate in (False, True)]
    students = [apply_plan(model, plan, material(model)).model for model, plan in zip(models, plans, strict=True)]
    plain, refitted = (kl_nats(teacher, log_probabilities(student)) for student in students)
    assert refitted < plain
