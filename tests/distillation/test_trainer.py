"""The Trainer: its gradient is the blend's, what is frozen, and that alpha 0 is plain fine-tuning."""

import math
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from moe_edge.contracts.config import StageConfig
from moe_edge.contracts.errors import ConfigError, MoeEdgeError
from moe_edge.distillation.checkpoints import WEIGHTS, load_weights
from moe_edge.distillation.feature_terms import FEATURE_TERMS
from moe_edge.distillation.signal import CachedSignal
from moe_edge.distillation.teacher import LiveTeacher
from moe_edge.distillation.telemetry import RoutingTelemetry
from moe_edge.distillation.terms import Needs, TermContext
from moe_edge.distillation.trainer import DistillationTrainer, DistillationTrainingArguments, Parts, RowDataset
from moe_edge.formulas.divergence import IGNORED_LABEL, kl_dense
from moe_edge.formulas.logit_views import WholeLogits
from moe_edge.storage.tensor_files import load_weights_file, save_tensors
from tests.distillation.parts import TOKENS, rows, tiny_student, tiny_teacher, write_cache


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


class Masked(RowDataset):
    """Rows whose first `hidden` tokens are no targets, as the prompt of an instruction is not."""

    def __init__(self, ids_NS: np.ndarray, hidden: int) -> None:
        super().__init__(ids_NS)
        self._hidden = hidden

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        labels_S = row["labels"].clone()
        labels_S[: self._hidden] = IGNORED_LABEL
        return row | {"labels": labels_S}


def test_a_cached_teacher_is_asked_only_where_a_label_is(tmp_path: Path) -> None:
    write_cache(tmp_path / "l.h5", tiny_teacher(), rows())
    signal, hidden = CachedSignal(tmp_path / "l.h5", {}), 5
    settings = arguments(tmp_path, distillation_alpha=1.0)
    trainer = DistillationTrainer(tiny_student(), settings, Masked(rows()[:4], hidden), signal=signal)
    trainer.train()
    expected = []
    for ids_S in torch.from_numpy(rows()[:4]).long():
        with torch.no_grad():
            student_SV = tiny_student()(ids_S[None]).logits[0]
        kl_S = signal.signal(ids_S, 2.0).forward_kl(WholeLogits(student_SV), 2.0)
        expected.append(kl_S[hidden - 1 : -1])  # position j is judged on token j + 1
    assert trainer.state.log_history[0]["kl_loss"] == pytest.approx(float(torch.cat(expected).mean()), rel=1e-4)


def test_losses_are_logged_as_means_over_the_steps_between_two_lines(tmp_path: Path) -> None:
    write_cache(tmp_path / "l.h5", tiny_teacher(), rows())
    logs = {}
    for every in (1, 3):
        settings = arguments(tmp_path, logging_steps=every)
        signal = CachedSignal(tmp_path / "l.h5", {})
        trainer = DistillationTrainer(tiny_student(), settings, RowDataset(rows()), signal=signal)
        trainer.train()
        logs[every] = [entry for entry in trainer.state.log_history if "total_loss" in entry]
    assert [len(entries) for entries in logs.values()] == [6, 2]
    for name in ("total_loss", "ce_loss", "kl_loss"):
        means = [fmean(entry[name] for entry in logs[1][start : start + 3]) for start in (0, 3)]
        assert [entry[name] for entry in logs[3]] == pytest.approx(means, rel=1e-4), name


def test_an_evaluation_between_two_steps_changes_nothing(tmp_path: Path) -> None:
    found = []
    for strategy in ("no", "steps"):
        student, teacher = tiny_student(), tiny_teacher()
        context = TermContext(student, teacher, StageConfig(stage_name="s"))
        parts = Parts([FEATURE_TERMS["mse"](context)], observers=[RoutingTelemetry(student)])
        live = LiveTeacher(teacher, parts.terms[0].needs)
        settings = arguments(
            tmp_path, loss_weights={"ce": 1.0, "kl": 1.0, "mse": 1.0}, eval_strategy=strategy, eval_steps=1
        )
        trainer = DistillationTrainer(
            student, settings, RowDataset(rows()[:16]), teacher=live, parts=parts, eval_dataset=RowDataset(rows()[16:])
        )
        trainer.train()
        lines = [entry for entry in trainer.state.log_history if "total_loss" in entry]
        found.append([{name: value for name, value in line.items() if name != "epoch"} for line in lines])
        judged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert len(judged) == (4 if strategy == "steps" else 0) and all(map(math.isfinite, judged))
    assert found[0] == found[1]


def test_a_step_without_a_single_label_adds_nothing(tmp_path: Path) -> None:
    settings = arguments(tmp_path, distillation_alpha=0.0)
    moved = one_step(DistillationTrainer(tiny_student(), settings, Masked(rows()[:4], TOKENS)))
    assert not any(change.any() for change in moved.values())


@pytest.mark.parametrize("together", [True, False])
def test_the_processes_tokens_are_counted_as_the_trainer_counts_them(tmp_path: Path, together: bool) -> None:
    """Gradients are averaged over processes: a count of all of them is made up for, a process's own is not."""
    settings = arguments(tmp_path, distillation_alpha=0.0, average_tokens_across_devices=together)
    trainer = DistillationTrainer(tiny_student(), settings, RowDataset(rows()))
    ids_BS = torch.from_numpy(rows()[:2]).long()
    batch, own = {"input_ids": ids_BS, "labels": ids_BS}, 2 * (TOKENS - 1)
    alone = float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=own))
    with mock.patch.object(type(trainer.accelerator), "num_processes", 3):
        seen = 3 * own if together else own
        assert float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=seen)) == pytest.approx(alone)


def test_processes_sum_the_same_losses(tmp_path: Path) -> None:
    """A process whose micro-batches are all written by its student has no cross-entropy; the others do."""
    trainer = DistillationTrainer(tiny_student(), arguments(tmp_path), RowDataset(rows()), teacher=live_teacher())
    sent = []
    with (
        mock.patch.object(type(trainer.accelerator), "num_processes", 2),
        mock.patch.object(trainer.accelerator, "reduce", lambda values, how: sent.append(len(values)) or values),
    ):
        trainer._over_processes({"kl": 1.0})
        trainer._over_processes({"kl": 1.0, "ce": 2.0})
    assert sent[0] == sent[1]


def live_teacher() -> LiveTeacher:
    return LiveTeacher(tiny_teacher(), Needs())


def test_a_checkpoint_without_an_untied_head_is_refused(tmp_path: Path) -> None:
    student = tiny_student(tied=False)
    trainer = DistillationTrainer(student, arguments(tmp_path, distillation_alpha=0.0), RowDataset(rows()))
    trainer.save_model(str(tmp_path / "whole"))
    load_weights(student, tmp_path / "whole")
    tensors = load_weights_file(tmp_path / "whole" / WEIGHTS)
    del tensors["lm_head.weight"]
    save_tensors(tmp_path / "whole" / WEIGHTS, tensors, {})
    with pytest.raises(MoeEdgeError, match=r"lm_head\.weight"):
        load_weights(student, tmp_path / "whole")


def test_a_users_reports_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    wanted = arguments(tmp_path / "out", distillation_alpha=0.0, max_steps=1, report_to="tensorboard")
    DistillationTrainer(tiny_student(), wanted, RowDataset(rows(), range(4))).train()
    assert list((tmp_path / "events").rglob("events.out.*"))
