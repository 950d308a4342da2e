"""A stage with every loss on layers and experts, and with rows that the student writes: trained and resumed bit by bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_edge.contracts.config import DistillConfig, OnPolicyConfig, StageConfig
from moe_edge.distillation.expert_terms import EXPERT_TERMS
from moe_edge.distillation.feature_terms import FEATURE_TERMS
from moe_edge.distillation.recovery import Recovery
from moe_edge.distillation.schedule import schedule_stages, split_rows
from moe_edge.distillation.signal import CachedSignal
from tests.distillation.parts import VOCAB, rows, tiny_student, tiny_teacher, write_cache
from tests.distillation.test_recovery import KillAt, Killed

NAMES = (*FEATURE_TERMS, *EXPERT_TERMS)
STEPS = 4
STAGE = StageConfig(
    stage_name="all",
    steps=STEPS,
    losses={"ce": 1.0, "reverse_kl": 1.0} | dict.fromkeys(NAMES, 0.3),
    layer_map="auto",
    on_policy=OnPolicyConfig(share=0.5, prompt_tokens=4, new_tokens=(4, 10)),
)
CONFIG = DistillConfig(batch_rows=4, stages=[STAGE])


def train(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    student = tiny_student()
    material: dict[str, Any] = {"ids_NS": torch.from_numpy(rows()[:4]).long()}
    signal = CachedSignal(folder / "logits.h5", {})
    work = Recovery(CONFIG, rows(), signal, VOCAB, folder / "teacher", folder / name, 0.0, material=material)
    (record,) = work.train(student, schedule_stages(CONFIG, split_rows(len(rows()))[0], rows().shape[1]))
    log = [{key: value for key, value in entry.items() if "seconds" not in key} for entry in record["log"]]
    return student.state_dict(), log


def test_trained_and_resumed_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_teacher()
    model.save_pretrained(tmp_path / "teacher")
    write_cache(tmp_path / "logits.h5", model, rows())
    straight, log = train(tmp_path, "straight")
    assert list(straight) == list(tiny_student().state_dict())
    assert len(log) == STEPS and all({f"{name}_loss" for name in NAMES} <= set(entry) for entry in log)
    assert sum(entry["rollout_tokens"] for entry in log) > 0
    plain = Recovery.trainer

    def with_kill(self: Recovery, *args: object) -> object:
        trainer = plain(self, *args)
        trainer.add_callback(KillAt(STEPS, 2))
        return trainer

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Recovery, "trainer", with_kill)
        train(tmp_path, "killed")
    resumed, resumed_log = train(tmp_path, "killed")
    assert resumed_log == log
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())
