"""Whole stages that train or watch routers: router losses, knowledge augmentation and a student-aware router together, a
kill in the middle, a stage for the routers alone, and recomputed activations.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_edge.contracts.config import DistillConfig, LrMultiplier, StageConfig
from moe_edge.distillation.recovery import Recovery
from moe_edge.distillation.router_terms import ROUTER_TERMS
from moe_edge.distillation.terms import MicroBatch, TeacherActivations, TermContext, TermInputs
from moe_edge.models.routing import ROUTER_PATTERN, router_parameters
from tests.distillation.parts import KEPT, killed_before, rows, schedules, tiny_student, tiny_teacher

BLEND = {"reverse_kl": 1.0, "load_balance": 0.01, "importance": 0.01, "router_z": 1e-3, "routing_kl": 0.1}
STEPS = 5


def config(**stage: object) -> DistillConfig:
    settings = {"stage_name": "routers", "steps": STEPS, "losses": BLEND, "learning_rate": 0.003, "teacher": "live"}
    return DistillConfig(batch_rows=4, alpha=1.0, stages=[StageConfig(**(settings | stage))])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routers") / "teacher"
    tiny_teacher().save_pretrained(folder)
    return folder


def train(teacher: Path, name: str, settings: DistillConfig) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    student = tiny_student()
    work = Recovery(settings, rows(), None, 96, teacher, teacher.parent / name, interval_s=0.0, inputs=TermInputs(KEPT))
    (record,) = work.train(student, schedules(settings))
    return student.state_dict(), record.log


AUGMENTED = config(teacher_routing={"policy": "ka", "sample_probability": 0.5}, student_aware_router={"every": 2})


@pytest.fixture(scope="module")
def straight(teacher: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    return train(teacher, "straight", AUGMENTED)


def test_everything_on_routers_is_in_the_log(straight: tuple[dict[str, Tensor], list[dict[str, float]]]) -> None:
    log = straight[1]
    assert len(log) == STEPS
    for entry in log:
        parts = sum(BLEND[name] * entry[f"{name}_loss"] for name in BLEND)
        assert entry["total_loss"] == pytest.approx(parts, rel=1e-3)
        assert {"router_entropy", "router_load_variation", "router_dead_experts", "router_drift_nats"} <= set(entry)
        assert 0.2 < entry["ka_sampled"] < 0.8 and entry["ka_changed"] < entry["ka_sampled"]
    assert ["sar_kl" in entry for entry in log] == [True, False, True, False, True]
    assert log[-1]["sar_drift_nats"] > 0 and log[-1]["router_drift_nats"] > log[0]["router_drift_nats"]


def test_a_kill_changes_no_bit(teacher: Path, straight: tuple[dict[str, Tensor], list[dict[str, float]]]) -> None:
    with killed_before(3):
        train(teacher, "killed", AUGMENTED)
    resumed, again = train(teacher, "killed", AUGMENTED)
    assert again == straight[1]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight[0].items())


def test_a_stage_for_the_routers_alone(teacher: Path) -> None:
    multipliers = [
        LrMultiplier(pattern=ROUTER_PATTERN, lr_multiplier=1.0),
        LrMultiplier(pattern=".*", lr_multiplier=0.0),
    ]
    student, before = tiny_student(), tiny_student().state_dict()
    settings = config(parameter_lr_multipliers=multipliers, losses={"kl": 1.0, "routing_kl": 1.0}, learning_rate=0.02)
    after, log = train(teacher, "alone", settings)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == set(router_parameters(student))
    assert log[-1]["kl_loss"] < log[0]["kl_loss"]


@pytest.mark.parametrize("name", ["load_balance", "routing_kl"])
def test_recomputed_activations_give_the_same_gradient(name: str) -> None:
    ids_BS = torch.from_numpy(rows()[:2]).long()
    slopes = []
    for recompute in (False, True):
        student = tiny_student().train()
        if recompute:
            student.gradient_checkpointing_enable()
        term = ROUTER_TERMS[name](TermContext(student, None, StageConfig(stage_name="s"), TermInputs(KEPT)))
        logits = {layer: torch.randn(ids_BS.numel(), 4, generator=torch.manual_seed(layer)) for layer in KEPT}
        with term.recording(student):
            student(ids_BS)
        loss = term.loss(
            MicroBatch(ids_BS, torch.ones_like(ids_BS, dtype=torch.bool), TeacherActivations(router_logits=logits))
        )
        loss.backward()
        slopes.append([parameter.grad for parameter in router_parameters(student).values()])
    assert all(torch.equal(one, other) and one.abs().max() > 0 for one, other in zip(*slopes, strict=True))
