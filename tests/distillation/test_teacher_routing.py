"""Which experts a live teacher uses: counts, totals, the rate, and the same draws after a resume.

Legend: E experts, K top-k, N experts in use, T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from moe_edge.contracts.config import StageConfig, TeacherRoutingConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.teacher import LiveTeacher
from moe_edge.distillation.teacher_routing import KnowledgeAugmentation, teacher_routing
from moe_edge.distillation.terms import Needs
from moe_edge.models.views import moe_layers
from tests.tiny import tiny_ids, tiny_model

EXPERTS = 8
VARIED = ("qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "lfm2_moe", "phimoe")  # one of every kind of gate
IDS = tiny_ids(tokens=64, rows=4)


def augmentation(seed: int = 0, **values: float) -> KnowledgeAugmentation:
    return KnowledgeAugmentation(TeacherRoutingConfig(policy="ka", **values), seed)


@contextmanager
def seen(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(ids, weights) that every experts module is handed, in the order of the calls."""
    calls: list[tuple[Tensor, Tensor]] = []
    hooks = [
        view.experts.register_forward_pre_hook(lambda _m, inputs: calls.append((inputs[1], inputs[2])))
        for view in moe_layers(model)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def run(model: nn.Module, policy: KnowledgeAugmentation, draw: int = 0) -> list[tuple[Tensor, Tensor]]:
    with policy.routing(model, draw), seen(model) as calls:
        model(IDS)
    return calls


@pytest.mark.parametrize("family", VARIED)
def test_every_token_uses_all_but_one_expert_with_its_own_total(family: str) -> None:
    model = tiny_model(family, experts=EXPERTS, layers=3)
    with torch.no_grad(), seen(model) as own:
        model(IDS)
    calls = run(model, augmentation(sample_probability=0.5))
    for index_TN, weight_TN in calls:
        assert index_TN.shape == weight_TN.shape == (IDS.numel(), EXPERTS - 1)
        assert all(len(set(row)) == EXPERTS - 1 for row in index_TN.tolist())
    torch.testing.assert_close(calls[0][1].sum(dim=1), own[0][1].sum(dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", VARIED)
def test_the_observed_rate_is_lambda(family: str) -> None:
    model, policy = tiny_model(family, experts=EXPERTS, layers=3), augmentation(sample_probability=0.05)
    for draw in range(2):
        run(model, policy, draw)
    pairs = 2 * len(moe_layers(model)) * IDS.numel()
    read = policy.read()
    assert read["ka_sampled"] == pytest.approx(0.05, abs=5 * sqrt(0.05 * 0.95 / pairs))
    assert 0 < read["ka_changed"] < read["ka_sampled"]
    assert policy.read() == {}


def test_draws_depend_on_seed_step_draw_and_place_and_on_nothing_else() -> None:
    model = tiny_model("qwen3_moe", experts=EXPERTS)
    policy = augmentation(sample_probability=1.0)

    def ids(step: int, draw: int, seed: int = 0, before: int = 0) -> list[list[int]]:
        fresh = policy if seed == 0 else augmentation(seed, sample_probability=1.0)
        fresh([], step)
        for _ in range(before):
            run(model, fresh)
        torch.rand(3)  # the global generator plays no part
        return run(model, fresh, draw)[0][0].tolist()

    first = ids(7, 0)
    assert ids(7, 0) == first
    others = [ids(8, 0), ids(7, 1), ids(7, 0, seed=1), ids(7, 0, before=1)]
    assert all(other != first for other in others)
    resumed = augmentation(sample_probability=1.0)
    resumed([], 7)
    assert run(model, resumed)[0][0].tolist() == first


def test_two_draws_of_a_live_teacher_differ_and_one_is_remembered() -> None:
    policy = augmentation(sample_probability=1.0)
    teacher = LiveTeacher(tiny_model("qwen3_moe", experts=EXPERTS), Needs(), True, policy.routing)
    first, second = teacher.run(IDS, draw=0), teacher.run(IDS, draw=1)
    assert not torch.equal(first.hidden_BSD, second.hidden_BSD)
    assert teacher.run(IDS, draw=1) is second


def test_a_number_of_experts_may_be_given() -> None:
    model = tiny_model("mixtral", experts=EXPERTS)
    assert run(model, augmentation(experts=3))[0][0].shape[1] == 3
    with pytest.raises(ConfigError, match="layer 0 has 8 experts, 9 are asked for"):
        run(model, augmentation(experts=9))


def test_policies_of_a_stage() -> None:
    def stage(policy: str, **more: object) -> StageConfig:
        return StageConfig(stage_name="s", teacher_routing={"policy": policy}, **more)

    assert teacher_routing(stage("own"), 0) is None
    assert isinstance(teacher_routing(stage("ka"), 0), KnowledgeAugmentation)
    for routing in (teacher_routing(stage("all"), 0), teacher_routing(stage("own", student_aware_router={}), 0)):
        assert routing is not None and routing.read() == {} and routing([], 3) == []
        model = tiny_model("qwen2_moe", experts=EXPERTS)
        with torch.no_grad(), routing.routing(model, 0), seen(model) as calls:
            model(IDS)
        assert {index_TN.shape[1] for index_TN, _ in calls} == {EXPERTS}
