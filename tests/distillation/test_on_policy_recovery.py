"""A stage with every loss on layers and experts, and with rows that the student writes: trained and resumed bit by bit."""

from pathlib import Path

import torch

from moe_edge.contracts.config import DistillConfig, OnPolicyConfig, StageConfig
from moe_edge.distillation.expert_terms import EXPERT_TERMS
from moe_edge.distillation.feature_terms import FEATURE_TERMS
from moe_edge.distillation.recovery import Recovery
from moe_edge.distillation.signal import CachedSignal
from moe_edge.distillation.terms import TermInputs
from tests.distillation.parts import VOCAB, killed_before, rows, schedules, tiny_student, tiny_teacher, write_cache

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
    inputs = TermInputs(ids_NS=torch.from_numpy(rows()[:4]).long())
    signal = CachedSignal(folder / "logits.h5", {})
    work = Recovery(CONFIG, rows(), signal, VOCAB, folder / "teacher", folder / name, 0.0, inputs=inputs)
    (record,) = work.train(student, schedules(CONFIG))
    log = [{key: value for key, value in entry.items() if "seconds" not in key} for entry in record.log]
    return student.state_dict(), log


def test_trained_and_resumed_bit_by_bit(tmp_path: Path) -> None:
    model = tiny_teacher()
    model.save_pretrained(tmp_path / "teacher")
    write_cache(tmp_path / "logits.h5", model, rows())
    straight, log = train(tmp_path, "straight")
    assert list(straight) == list(tiny_student().state_dict())
    assert len(log) == STEPS and all({f"{name}_loss" for name in NAMES} <= set(entry) for entry in log)
    assert sum(entry["rollout_tokens"] for entry in log) > 0
    with killed_before(2):
        train(tmp_path, "killed")
    resumed, resumed_log = train(tmp_path, "killed")
    assert resumed_log == log
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())
