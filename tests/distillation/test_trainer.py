"""The Trainer: its gradient is the blend's, what is frozen, and that alpha 0 is plain fine-tuning."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.signal import CachedSignal
from moe_edge.distillation.trainer import DistillationTrainer, DistillationTrainingArguments, RowDataset
from moe_edge.formulas.divergence import kl_dense
from tests.distillation.parts import rows, tiny_student, tiny_teacher, write_cache


def arguments(folder: Path, **values: Any) -> DistillationTrainingArguments:
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.1}
    settings |= {"optim": "sgd", "max_grad_norm": 0.0, "num_train_epochs": 1, "logging_steps": 1, "use_cpu": True}
    settings |= {"save_strategy": "no"}
    return DistillationTrainingArguments(output_dir=str(folder), **(settings | values))


def one_step(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    """What one optimizer step adds to every parameter, divided by the learning rate: minus the gradient."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    rate = trainer.args.learning_rate
    return {name: (before[name] - p.detach()) / rate for name, p in trainer.model.named_parameters()}


def test_alpha_0_is_plain_fine_tuning(tmp_path: Path) -> None:
    dataset, student = RowDataset(rows(), range(4)), tiny_student()
    trainer = DistillationTrainer(student, arguments(tmp_path, distillation_alpha=0.0), dataset)
    assert trainer.weights == {"ce": 1.0}
    ours = one_step(trainer)
    reference = tiny_student()
    ids = torch.from_numpy(rows()[:4]).long()
    reference(ids, labels=ids).loss.backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_alpha_1_with_the_whole_vocabulary_is_the_dense_kl(tmp_path: Path) -> None:
    teacher, student = tiny_teacher(), tiny_student()
    ids = torch.from_numpy(rows()[:4]).long()

    class Dense:
        """A live teacher: the whole distribution as a top-V."""

        def signal(self, ids_S: torch.Tensor, temperature: float) -> Any:
            from moe_edge.distillation.signal import TeacherSignal
            from moe_edge.formulas.divergence import teacher_topk

            with torch.no_grad():
                top = teacher_topk(teacher(ids_S[None]).logits[0], 96, (temperature,))
            return TeacherSignal(top.indices_TK, top.logprobs_TK, top.tail_logmass_TH[:, 0])

    settings = arguments(tmp_path, distillation_alpha=1.0, distillation_temperature=2.0)
    trainer = DistillationTrainer(student, settings, RowDataset(rows(), range(4)), signal=Dense())
    ours = one_step(trainer)
    reference = tiny_student()
    with torch.no_grad():
        target = teacher(ids).logits[:, :-1].flatten(0, 1)
    (4 * kl_dense(target, reference(ids).logits[:, :-1].flatten(0, 1), 2.0).mean()).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-5)
    entry = trainer.state.log_history[0]
    assert entry["total_loss"] == pytest.approx(4 * entry["kl_loss"], rel=1e-4)
    assert "ce_loss" not in entry


def test_the_logged_total_is_the_blend(tmp_path: Path) -> None:
    write_cache(tmp_path / "l.h5", tiny_teacher(), rows())
    signal = CachedSignal(tmp_path / "l.h5", {})
    trainer = DistillationTrainer(
        tiny_student(), arguments(tmp_path, distillation_alpha=0.5), RowDataset(rows()), signal=signal
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "total_loss" in entry]
    assert len(entries) == 6
    for entry in entries:
        blend = 0.5 * entry["ce_loss"] + 0.5 * 4 * entry["kl_loss"]
        assert entry["total_loss"] == pytest.approx(blend, rel=1e-4)


def test_multipliers_reach_the_optimizer(tmp_path: Path) -> None:
    multipliers = [
        {"pattern": r"\.experts\.", "lr_multiplier": 1.0},
        {"pattern": "embed", "lr_multiplier": 0.1},
        {"pattern": ".*", "lr_multiplier": 0.0},
    ]
    student = tiny_student()
    settings = arguments(tmp_path, distillation_alpha=0.0, optim="adamw_torch")
    trainer = DistillationTrainer(student, settings, RowDataset(rows(), range(4)), lr_multipliers=multipliers)
    groups = trainer.create_optimizer().param_groups
    assert sorted(group["lr"] for group in groups) == pytest.approx([0.01, 0.1])
    held = {id(parameter) for group in groups for parameter in group["params"]}
    moved = one_step(trainer)
    for name, parameter in student.named_parameters():
        trains = ".experts." in name or "embed" in name
        assert (id(parameter) in held) == parameter.requires_grad == trains
        assert bool(moved[name].any()) == trains, name


def test_what_a_loss_needs_is_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'kl' needs the teacher"):
        DistillationTrainer(tiny_student(), arguments(tmp_path), RowDataset(rows()))
    only_cka = arguments(tmp_path, loss_weights={"cka": 1.0})
    with pytest.raises(ConfigError, match="'cka' needs the teacher"):
        DistillationTrainer(tiny_student(), only_cka, RowDataset(rows()))


def test_padded_vocabulary_is_cut(tmp_path: Path) -> None:
    student = tiny_student(tied=False)
    trainer = DistillationTrainer(
        student, arguments(tmp_path, distillation_alpha=0.0), RowDataset(rows() % 90, range(4)), vocab=90
    )
    moved = one_step(trainer)["lm_head.weight"]
    assert moved[:90].any() and not moved[90:].any()
