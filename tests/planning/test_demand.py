"""What is refused before any weight is read."""

from pathlib import Path

import pytest

from moe_edge.contracts.errors import ConfigError, InfeasibleError, InputRejected
from moe_edge.planning.demand import check_action
from moe_edge.planning.headers import model_headers
from tests.planning.plan_helpers import config, headers


def check(tmp_path: Path, *settings: str, family: str = "qwen3_moe", target: str = "cpu") -> None:
    teacher = headers(tmp_path, family, experts=6, hidden=64, width=64, layers=3)
    check_action(config(*settings, target=target), teacher, model_headers(teacher).spec)


@pytest.mark.parametrize("settings", [(), ("plan.expert_width=32",), ("plan.expert_width=64", "plan.action=merge")])
def test_possible_actions_pass(tmp_path, settings):
    assert check(tmp_path, *settings) is None


@pytest.mark.parametrize("width", [0, 16, 48, 96])
def test_an_impossible_width_is_a_usage_error(tmp_path, width):
    with pytest.raises(ConfigError, match="multiple of 32 up to the teacher's 64"):
        check(tmp_path, f"plan.expert_width={width}")


def test_a_width_that_other_tensors_share_is_refused_from_headers(tmp_path):
    with pytest.raises(InputRejected, match="shared_experts.* takes its size from"):
        check(tmp_path, "plan.expert_width=32", family="ernie4_5_moe")


@pytest.mark.parametrize("target", ["jetson", "cpu"])
def test_a_shared_core_is_refused_under_a_byte_budget_unless_forced(tmp_path, target):
    settings = ["plan.action=shared-core", *(["target.budget.weights=1GiB"] if target == "cpu" else [])]
    with pytest.raises(InfeasibleError, match="saves no bytes") as caught:
        check(tmp_path, *settings, target=target)
    assert caught.value.exit_code == 3
    assert check(tmp_path, *settings, "plan.force=true", target=target) is None


def test_a_shared_core_without_a_byte_budget_passes_and_is_not_refitted(tmp_path):
    settings = [
        "plan.action=shared-core",
        "target.hardware.memory_bytes={value: null, source: a test, confidence: assumed}",
    ]
    check(tmp_path, *settings)
    with pytest.raises(ConfigError, match="compensate does not go"):
        check(tmp_path, *settings, "plan.compensate=true")
