"""Every method that a recipe can name, through the stage runner: what it logs, that it teaches, and that a kill costs nothing."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from moe_edge.contracts.config import DistillConfig, Loss, StageConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.cross_tokenizer import ACROSS
from moe_edge.distillation.losses import LOSSES
from moe_edge.distillation.recovery import Recovery
from moe_edge.distillation.signal import CachedSignal
from moe_edge.distillation.stage_parts import wants_live_logits, wants_teacher
from moe_edge.distillation.terms import TermInputs
from moe_edge.formulas.divergence import kl_dense
from tests.distillation.parts import KEPT, killed_before, rows, schedules, tiny_student, tiny_teacher, write_cache

STEPS = 3
KA = {"policy": "ka", "sample_probability": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "cached": {"losses": {"kl": 1.0}},
    "live": {"losses": {"kl": 1.0}, "teacher": "live"},
    "on_policy": {"losses": {"reverse_kl": 1.0}, "on_policy": {"share": 0.5, "prompt_tokens": 4, "new_tokens": (4, 8)}},
    "ka, code": {"losses": {"reverse_kl": 1.0}, "teacher_routing": KA},
    "ka, paper": {"losses": {"reverse_kl": 1.0}, "teacher_routing": KA | {"mode": "paper"}},
    "ka, paper, on_policy": {  # the kill falls between updates that share what the student wrote
        "losses": {"reverse_kl": 1.0},
        "teacher_routing": KA | {"mode": "paper", "draws": 3},
        "on_policy": {"share": 1.0, "prompt_tokens": 4, "new_tokens": (4, 8)},
    },
    "all": {"losses": {"reverse_kl": 1.0}, "teacher_routing": {"policy": "all"}},
    "sar": {"losses": {"reverse_kl": 1.0}, "student_aware_router": {"every": 2, "learning_rate": 1e-2}},
}
ALSO_LOGGED = {
    "on_policy": "rollout_tokens",
    "ka, code": "ka_sampled",
    "ka, paper": "ka_sampled",
    "ka, paper, on_policy": "rollout_tokens",
    "sar": "sar_drift_nats",
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    tiny_teacher().save_pretrained(folder / "teacher")
    write_cache(folder / "logits.h5", tiny_teacher(), rows())
    return folder / "teacher"


def config(**stage: Any) -> DistillConfig:
    stages = [StageConfig(stage_name="only", steps=STEPS, learning_rate=0.01, **stage)]
    return DistillConfig(batch_rows=4, alpha=1.0, stages=stages)


def train(teacher: Path, settings: DistillConfig, folder: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    inputs = TermInputs(KEPT, torch.from_numpy(rows()[:4]).long())
    signal = CachedSignal(teacher.parent / "logits.h5", {})
    work = Recovery(settings, rows(), signal, 96, teacher, folder, 0.0, inputs)
    student = tiny_student()
    stages = schedules(settings)
    work.check(student, stages)
    (record,) = work.train(student, stages)
    return student.state_dict(), record.log


@pytest.mark.parametrize("name", sorted(set(get_args(Loss)) - set(ACROSS)))
def test_every_loss_is_logged_and_moves_the_student(teacher: Path, tmp_path: Path, name: str) -> None:
    settings = config(losses={name: 1.0}, alpha=0.0 if name == "ce" else 1.0)
    before = tiny_student().state_dict()
    after, log = train(teacher, settings, tmp_path)
    assert [entry["step"] for entry in log] == [1, 2, 3]
    for entry in log:
        assert entry[f"{name}_loss"] == pytest.approx(entry["total_loss"], rel=1e-3, abs=1e-6)
        assert 0 <= entry["router_entropy"] <= 1
    assert after.keys() == before.keys()  # nothing is left behind in the student
    assert any(not torch.equal(after[key], before[key]) for key in before)


def test_a_recipe_can_name_every_loss() -> None:
    assert set(get_args(Loss)) == set(LOSSES)


def test_losses_across_tokenizers_say_when_there_are_none(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs both tokenizers"):
        train(teacher, config(losses={"uld": 1.0}), tmp_path)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_kill_costs_no_bit_of_any_method(teacher: Path, tmp_path: Path, method: str) -> None:
    settings = config(**METHODS[method])
    straight, log = train(teacher, settings, tmp_path / "straight")
    assert all(torch.isfinite(torch.tensor(entry["total_loss"])) for entry in log)
    assert ALSO_LOGGED.get(method, "total_loss") in log[0]
    with killed_before(2):
        train(teacher, settings, tmp_path / "killed")
    resumed, again = train(teacher, settings, tmp_path / "killed")
    for key, tensor in straight.items():
        assert torch.equal(resumed[key], tensor), key
    timeless = [{k: v for k, v in entry.items() if "seconds" not in k} for entry in again]
    assert timeless == [{k: v for k, v in entry.items() if "seconds" not in k} for entry in log]


def test_the_cached_teacher_is_a_lower_bound_of_the_live_one_which_is_exact(teacher: Path, tmp_path: Path) -> None:
    _, cached = train(teacher, config(**METHODS["cached"]), tmp_path / "cached")
    _, live = train(teacher, config(**METHODS["live"]), tmp_path / "live")
    (schedule,) = schedules(config(**METHODS["live"]))
    ids = torch.from_numpy(rows()[schedule.rows[:4]]).long()
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].flatten(0, 1) for model in (tiny_teacher(), tiny_student()))
    assert live[0]["kl_loss"] == pytest.approx(float(kl_dense(p, q).mean()), rel=1e-4)
    assert 0 < cached[0]["kl_loss"] < live[0]["kl_loss"]


def test_paper_mode_updates_on_every_batch_as_often_as_it_draws() -> None:
    settings = config(losses={"reverse_kl": 1.0}, teacher_routing=KA | {"mode": "paper", "draws": 3})
    (schedule,) = schedules(settings)
    batches = [schedule.rows[start : start + 4] for start in range(0, 12, 4)]
    assert batches[0] == batches[1] == batches[2] and schedule.steps == STEPS


def test_paper_mode_writes_once_for_all_of_a_batchs_updates(teacher: Path, tmp_path: Path) -> None:
    """Algorithm 1: y is drawn once, then the student is updated M times against M draws of the teacher."""
    _, log = train(teacher, config(**METHODS["ka, paper, on_policy"]), tmp_path)
    assert log[0]["rollout_tokens"] > 0 and [entry["rollout_tokens"] for entry in log[1:]] == [0, 0]
    assert all(entry["ka_sampled"] > 0 for entry in log)
    assert len({entry["reverse_kl_loss"] for entry in log}) == STEPS


def test_who_needs_the_teacher_in_memory() -> None:
    live = {method: wants_live_logits(config(**stage), config(**stage).stages[0]) for method, stage in METHODS.items()}
    assert live == {method: method != "cached" for method in METHODS}
    only_router = config(losses={"load_balance": 1.0})
    assert not wants_teacher(only_router, only_router.stages[0])
    features = config(losses={"kl": 1.0, "mse": 1.0})
    assert wants_teacher(features, features.stages[0]) and not wants_live_logits(features, features.stages[0])
    deaf = METHODS["sar"] | {"losses": {"load_balance": 1.0}}
    with pytest.raises(ConfigError, match="no divergence"):
        wants_live_logits(config(**deaf), config(**deaf).stages[0])
    stage = METHODS["on_policy"] | {"teacher": "cached"}
    with pytest.raises(ConfigError, match="needs the live teacher"):
        wants_live_logits(config(**stage), config(**stage).stages[0])
