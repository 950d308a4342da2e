"""Students with padded layers: training leaves padding alone whatever the loss, nobody hears it, and losses that would compare
it are refused."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from moe_edge.contracts.config import DistillConfig, StageConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.recovery import Recovery
from moe_edge.distillation.telemetry import RoutingTelemetry
from moe_edge.distillation.terms import TermInputs
from moe_edge.models.padding import check_padding
from moe_edge.models.pruning import prune, without_padding
from moe_edge.models.routing import router_parameters
from moe_edge.models.taps import recorded_activations
from moe_edge.models.views import moe_layers
from tests.distillation.parts import VOCAB, rows, schedules
from tests.tiny import tiny_ids, tiny_model
from tests.uneven_models import PADDABLE, uneven_choice

LOSSES = {"ce": 1.0, "kl": 1.0, "load_balance": 0.1, "importance": 0.1, "router_z": 0.1, "routing_kl": 1.0}
IDS = tiny_ids(tokens=32, rows=4, vocab=VOCAB)


def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel, dict[int, list[int]]]:
    teacher = tiny_model(family, experts=8, layers=3, hidden=32, width=16, vocab=VOCAB)
    student = copy.deepcopy(teacher)
    kept = uneven_choice(student)
    prune(student, kept, uneven=True)
    return teacher, student, kept


def work_of(tmp_path: Path, teacher: PreTrainedModel, kept: dict, losses: dict) -> tuple[Recovery, list]:
    teacher.save_pretrained(tmp_path / "teacher")
    stage = StageConfig(stage_name="all", steps=4, losses=losses, learning_rate=0.02, teacher="live")
    settings = DistillConfig(batch_rows=4, stages=[stage])
    inputs = TermInputs(kept, torch.from_numpy(rows()[:4]).long())
    work = Recovery(settings, rows(), None, VOCAB, tmp_path / "teacher", tmp_path / "run", 1e9, inputs)
    return work, schedules(settings)


def padding_of(student: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every number of every padding expert."""
    found = {}
    for view in moe_layers(student):
        rest = sorted(set(range(view.count)) - set(view.real))
        for axis in view.expert_axes():
            found[f"{view.index}.{axis.name}.{axis.tensor.shape}"] = (
                axis.tensor.detach().index_select(axis.axis, torch.tensor(rest, dtype=torch.long)).clone()
            )
    return found


@pytest.mark.parametrize("family", PADDABLE)
def test_training_moves_no_bit_of_the_padding(family: str, tmp_path: Path) -> None:
    teacher, student, kept = pair(family)
    before, routers = padding_of(student), {n: p.detach().clone() for n, p in router_parameters(student).items()}
    work, stages = work_of(tmp_path, teacher, kept, LOSSES)
    work.check(student, stages)
    work.train(student, stages)
    after = padding_of(student)
    assert before.keys() == after.keys() and any(len(values) for values in before.values())
    for name, values in before.items():
        assert torch.equal(values, after[name].cpu()), name
    check_padding(student)
    assert all(not torch.equal(old, router_parameters(student)[name]) for name, old in routers.items())


@pytest.mark.parametrize("family", PADDABLE)
def test_what_is_recorded_is_that_of_the_model_without_padding(family: str) -> None:
    _, student, kept = pair(family)
    plain = copy.deepcopy(student)
    without_padding(plain)
    recorded, read = [], []
    for model in (student, plain):
        telemetry = RoutingTelemetry(model)
        with torch.no_grad(), recorded_activations(model, routers=kept) as activations, telemetry.recording(model):
            model(IDS)
        recorded.append(activations)
        read.append(telemetry.read())
    for layer, ids in kept.items():
        assert recorded[0].router_logits[layer].shape[1] == len(ids)
        torch.testing.assert_close(
            recorded[0].router_logits[layer], recorded[1].router_logits[layer], rtol=0, atol=1e-5
        )
        chosen, expected = (activations.routing[layer][0].sort(dim=1).values for activations in recorded)
        assert (chosen == expected).float().mean() > 0.99
    assert read[0] == pytest.approx(read[1], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("loss", ["expert_cka", "expert_diversity"])
def test_losses_that_compare_all_experts_are_refused(loss: str, tmp_path: Path) -> None:
    teacher, student, kept = pair("gpt_oss")
    work, stages = work_of(tmp_path, teacher, kept, {loss: 1.0})
    with pytest.raises(ConfigError, match="padded"):
        work.check(student, stages)
        work.train(student, stages)
