"""shared-core: folding changes nothing, the fit beats dropping it all to one expert, the student trains."""

import copy

import pytest
import torch

from moe_edge.compression.surgery import apply_plan
from moe_edge.contracts.errors import ConfigError
from moe_edge.models.shared_core import SharedCoreExperts, fold
from moe_edge.models.views import moe_layers
from tests.compression.action_helpers import (
    HALF,
    KEPT,
    ROWS,
    kl_nats,
    log_probabilities,
    material,
    plan8,
    plan_of,
    planted,
)
from tests.tiny import FAMILY_NAMES, tiny_model


def shared(family: str, **changes: object):
    model = tiny_model(family, **({"width": 64} if "expert_width" in changes else {}))
    values = {"action": "shared-core", "shared_rank": 4} | changes
    return apply_plan(model, plan_of(KEPT, **values), material(model))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_folded_student_gives_the_same_logits(family):
    applied = shared(family)
    plain = fold(applied.model)
    with torch.no_grad():
        folded, wrapped = plain(ROWS).logits, applied.model(ROWS).logits
    assert float((folded - wrapped).abs().max()) < 1e-5
    assert plain.config.model_type == family
    assert [(view.count, view.top_k) for view in moe_layers(plain)] == [(4, 2), (4, 2)]
    names = [name for name, _ in applied.model.named_parameters() if "experts" in name]
    assert {name.split("experts.")[1].split(".")[0] for name in names} == {
        "shared_core",
        "input_wrapper",
        "output_wrapper",
    }
    for record in applied.layers:
        assert record["experts_missed"] <= record["experts_missed_at_start"] < 1


def test_the_fit_beats_random_cores_and_wrappers():
    model = tiny_model("qwen3_moe")
    teacher, fitted = log_probabilities(model), shared("qwen3_moe").model
    kl = kl_nats(teacher, log_probabilities(fitted))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        noisy = copy.deepcopy(fitted)
        with torch.no_grad():
            for name, parameter in noisy.named_parameters():
                if "shared_core" in name or "wrapper" in name:
                    parameter.copy_(parameter.std() * torch.randn(parameter.shape, generator=generator))
        assert kl < kl_nats(teacher, log_probabilities(noisy))


def test_copies_share_one_core_without_loss():
    model = planted("permuted")
    for view in moe_layers(model):
        with torch.no_grad():
            view.experts.gate_up_proj.copy_(view.experts.gate_up_proj[:1].expand_as(view.experts.gate_up_proj))
            view.experts.down_proj.copy_(view.experts.down_proj[:1].expand_as(view.experts.down_proj))
    teacher = log_probabilities(model)
    student = apply_plan(model, plan8(action="shared-core", shared_rank=2, kept=HALF), material(model)).model
    assert kl_nats(teacher, log_probabilities(student)) < 1e-6


def test_one_training_step_moves_core_and_wrappers():
    student = shared("qwen2_moe").model
    student.train()
    student(input_ids=ROWS, labels=ROWS).loss.backward()
    module = next(module for module in student.modules() if isinstance(module, SharedCoreExperts))
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("changes", [{"top_k": 1}, {"expert_width": 32}, {"sequential": True}])
def test_it_composes(changes):
    applied = shared("olmoe", **changes)
    with torch.no_grad():
        difference = fold(applied.model)(ROWS).logits - applied.model(ROWS).logits
    assert float(difference.abs().max()) < 1e-5
    assert applied.down_energy[0].shape == (4, 32)


def test_it_needs_calibration_rows():
    with pytest.raises(ConfigError, match="needs a profile"):
        apply_plan(tiny_model("qwen3_moe"), plan_of(KEPT, action="shared-core"))
