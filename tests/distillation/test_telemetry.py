"""Routing telemetry against numbers worked out from what the routers say, its alarm, and that it changes nothing.

Legend: T tokens, E experts, K top-k.
"""

import logging
from math import log

import pytest
import torch
from torch import nn

from moe_edge.distillation.telemetry import RoutingTelemetry
from moe_edge.models.routing import router_parameters
from moe_edge.models.taps import recorded_activations
from moe_edge.models.views import moe_layers
from tests.distillation.parts import VOCAB, tiny_student
from tests.tiny import ALL_FAMILIES, tiny_ids, tiny_model

IDS = tiny_ids(tokens=32, rows=4, vocab=VOCAB)


def watch(telemetry: RoutingTelemetry, student: nn.Module, passes: int = 1) -> dict[str, float]:
    for _ in range(passes):
        with telemetry.recording(student):
            student(IDS)
    return telemetry.read()


def test_the_numbers_are_those_of_the_routing() -> None:
    student = tiny_student("olmoe")
    with torch.no_grad(), recorded_activations(student, routers=range(3)) as activations:
        student(IDS)
    entropy, variation, dead = [], [], []
    for layer in range(3):
        gate_TE = activations.router_logits[layer].double().softmax(dim=1)
        counts = [int((activations.routing[layer][0] == expert).sum()) for expert in range(3)]
        mean = sum(counts) / 3
        entropy.append(float(-(gate_TE * gate_TE.log()).sum(dim=1).mean()) / log(3))
        variation.append((sum((count - mean) ** 2 for count in counts) / 3) ** 0.5 / mean)
        dead += [count < 0.01 * mean for count in counts]
    telemetry = RoutingTelemetry(student)
    read = watch(telemetry, student, passes=2)
    assert read["router_entropy"] == pytest.approx(sum(entropy) / 3, rel=1e-5)
    assert read["router_load_variation"] == pytest.approx(sum(variation) / 3, rel=1e-5)
    assert read["router_dead_experts"] == pytest.approx(sum(dead) / 9)
    assert read["router_drift_nats"] == pytest.approx(0, abs=1e-6)
    assert telemetry.read() == {}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_can_be_watched_while_it_trains(family: str) -> None:
    student = tiny_model(family, layers=3, vocab=VOCAB).train()
    telemetry = RoutingTelemetry(student)
    torch.manual_seed(0)  # phimoe draws its experts
    student(IDS).logits.mean().backward()
    plain = {
        name: parameter.grad.clone() for name, parameter in student.named_parameters() if parameter.grad is not None
    }
    student.zero_grad()
    torch.manual_seed(0)
    with telemetry.recording(student):
        student(IDS).logits.mean().backward()
    assert all(torch.equal(student.get_parameter(name).grad, slope) for name, slope in plain.items())
    read = telemetry.read()
    assert 0 < read["router_entropy"] <= 1 and read["router_load_variation"] > 0
    assert 0 <= read["router_dead_experts"] < 1


def test_drift_is_from_the_start_of_the_stage_also_after_a_resume() -> None:
    student = tiny_student()
    telemetry = RoutingTelemetry(student)
    state = telemetry.state()
    with torch.no_grad():
        for parameter in router_parameters(student).values():
            parameter.mul_(1.5)
    drift = watch(telemetry, student)["router_drift_nats"]
    assert drift > 1e-3
    resumed = RoutingTelemetry(student)
    assert watch(resumed, student)["router_drift_nats"] == pytest.approx(0, abs=1e-6)
    resumed.restore(state)
    assert watch(resumed, student)["router_drift_nats"] == drift


def collapse(student: nn.Module) -> None:
    """Every token's first choice is expert 0, in every layer."""
    for view in moe_layers(student):
        view.router.register_forward_hook(lambda _m, _i, output: (output[0], output[1], torch.zeros_like(output[2])))


def test_a_collapse_rings_once(caplog: pytest.LogCaptureFixture) -> None:
    student = tiny_model("qwen3_moe", vocab=VOCAB, experts=8)
    telemetry = RoutingTelemetry(student)
    with caplog.at_level(logging.WARNING):
        watch(telemetry, student)
    assert "collapsed" not in caplog.text
    collapse(student)
    with caplog.at_level(logging.WARNING):
        first = watch(telemetry, student)
        watch(telemetry, student)
    assert first["router_dead_experts"] == pytest.approx(7 / 8)
    rings = [record.message for record in caplog.records if "collapsed" in record.message]
    assert len(rings) == 2
    assert rings[0] == "the router of layer 0 looks collapsed: one expert carries 8.0 times its even share (limit 4)"


def test_a_pass_that_fails_is_not_counted() -> None:
    student = tiny_student()
    telemetry = RoutingTelemetry(student)
    with pytest.raises(KeyError), telemetry.recording(student):
        raise KeyError
    assert telemetry.read() == {}
