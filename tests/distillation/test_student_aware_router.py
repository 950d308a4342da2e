"""The student-aware router: its gradient against a plain computation, what it changes, its drift guard and its resume.

Legend: B rows, S tokens, T tokens, E experts, V vocabulary.
"""

import hashlib
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from moe_edge.contracts.config import StudentAwareRouterConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.student_aware_router import StudentAwareRouter
from moe_edge.distillation.teacher import LiveTeacher
from moe_edge.distillation.terms import Needs
from moe_edge.models.loading import load_model
from moe_edge.models.routing import rerouted, router_parameters
from moe_edge.models.taps import recorded_activations
from moe_edge.models.views import moe_layers
from tests.distillation.parts import VOCAB, tiny_student, tiny_teacher
from tests.tiny import ALL_FAMILIES, tiny_checkpoint, tiny_ids, tiny_model

RATE = 1e-2


def batches(rows: int = 2, count: int = 2) -> list[dict[str, Tensor]]:
    ids = [tiny_ids(tokens=12, rows=rows, vocab=VOCAB, seed=seed) for seed in range(count)]
    return [{"input_ids": ids_BS, "labels": ids_BS} for ids_BS in ids]


def router(teacher: nn.Module, student: nn.Module | None = None, **values: float) -> StudentAwareRouter:
    config = StudentAwareRouterConfig(**({"learning_rate": RATE} | values))
    return StudentAwareRouter(student or tiny_student(), LiveTeacher(teacher, Needs(), True), config)


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def reference_loss(teacher: nn.Module, student: nn.Module, rows: list[dict[str, Tensor]], beta: float) -> Tensor:
    """KL(p || q) + beta CV^2 with whole logits in float64, over all micro-batches."""
    layers = [view.index for view in moe_layers(teacher)]
    total, tokens = torch.zeros((), dtype=torch.float64), sum(row["labels"][:, 1:].numel() for row in rows)
    for row in rows:
        with torch.no_grad():
            q_BSV = student(row["input_ids"]).logits[:, :-1].double().log_softmax(dim=-1)
        everything = lambda _layer, gate_TE, _: torch.arange(gate_TE.shape[1]).expand_as(gate_TE)  # noqa: E731
        with rerouted(teacher, everything), recorded_activations(teacher, routers=layers) as activations:
            p_BSV = teacher(row["input_ids"]).logits[:, :-1].double().log_softmax(dim=-1)
        kl = (p_BSV.exp() * (p_BSV - q_BSV)).sum() / tokens
        variation = torch.zeros((), dtype=torch.float64)
        for logits_TE in activations.router_logits.values():
            load_E = logits_TE.double().softmax(dim=1).sum(dim=0)
            variation = variation + load_E.var(correction=0) / load_E.mean() ** 2 / len(layers)
        total = total + kl + beta * variation * row["labels"][:, 1:].numel() / tokens
    return total


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_step_is_adams_on_the_gradient_of_the_papers_loss(beta: float) -> None:
    teacher, student, rows = tiny_teacher("olmoe"), tiny_student("olmoe"), batches()
    plain = tiny_teacher("olmoe")
    parameters = router_parameters(plain)
    loss = reference_loss(plain, student, rows, beta)
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=0.0)
    for parameter, slope in zip(parameters.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True):
        parameter.grad = slope
    optimizer.step()
    sar = router(teacher, student, beta=beta)
    assert sar(rows, 0) is rows
    for name, parameter in router_parameters(teacher).items():
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-3, atol=1e-4)
    read = sar.read()
    assert read["sar_kl"] + beta * read["sar_importance"] == pytest.approx(loss.item(), rel=1e-4)
    assert sar.read() == {}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_only_the_routers_of_the_teacher_change(family: str) -> None:
    teacher, student = tiny_model(family, layers=3, vocab=VOCAB), tiny_model(family, layers=3, vocab=VOCAB, seed=1)
    if getattr(teacher.config, "lm_head_bias", False):
        teacher.lm_head.bias = student.lm_head.bias = None  # such a head is refused, in training, too
    before, theirs = frozen(teacher), frozen(student)
    sar = router(teacher, student)
    student.train()
    sar(batches(), 0)
    moved = {name for name, tensor in teacher.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(router_parameters(teacher))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in student.state_dict().items())
    assert student.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in (*teacher.parameters(), *student.parameters()))
    assert all(not module._forward_hooks for module in teacher.modules())


def test_router_steps_bring_the_teacher_towards_the_student() -> None:
    teacher, student = tiny_teacher(), tiny_student()
    sar = router(teacher, student, beta=0.0, max_drift_nats=10.0)
    values = []
    for step in range(25):
        sar(batches(), step)
        values.append(sar.read()["sar_kl"])
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize("family", ["qwen3_moe", "lfm2_moe", "gpt_oss"])
def test_recomputing_the_teachers_layers_changes_no_bit_and_keeps_less(family: str) -> None:
    student, states, kept = tiny_model(family, layers=3, vocab=VOCAB, seed=1), [], []
    for recompute in (False, True):
        teacher = tiny_model(family, layers=3, vocab=VOCAB)
        sar = StudentAwareRouter(
            student, LiveTeacher(teacher, Needs()), StudentAwareRouterConfig(learning_rate=RATE), recompute=recompute
        )
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.nbytes) or t, lambda t: t):
            sar(batches(), 0)
        states.append(frozen(teacher))
        kept.append(sum(saved))
        assert all("forward" not in vars(module) for module in teacher.modules())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert kept[1] < 0.7 * kept[0]


def test_the_numbers_are_those_of_the_last_router_step_however_seldom_they_are_read() -> None:
    read = []
    for reads in (2, 1):
        sar = router(tiny_teacher(), tiny_student(), max_drift_nats=1e-12)
        sar(batches(), 0)
        if reads == 2:
            sar.read()
        sar(batches(), 1)
        read.append(sar.read())
    assert read[0].pop("sar_restored") == 1.0 and read[1].pop("sar_restored") == 2.0  # how often since the last call
    assert read[0] == read[1] and read[0]["sar_kl"] > 0


def test_every_says_how_often() -> None:
    sar = router(tiny_teacher(), every=3)
    steps = []
    for step in range(7):
        sar(batches(), step)
        steps.append("sar_kl" in sar.read())
    assert steps == [True, False, False, True, False, False, True]


def test_routers_that_drift_too_far_come_back(caplog: pytest.LogCaptureFixture) -> None:
    teacher = tiny_teacher()
    before = frozen(teacher)
    sar = router(teacher, learning_rate=0.5, max_drift_nats=0.05)
    with caplog.at_level(logging.WARNING):
        sar(batches(), 0)
    read = sar.read()
    assert read["sar_restored"] == 1.0 and read["sar_drift_nats"] > 0.05
    assert "nats from its snapshot (limit 0.05); all routers are put back" in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(name.startswith("exp_avg") for name in sar.state())


def test_small_steps_are_not_lost_in_bfloat16() -> None:
    student = tiny_student()
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        teacher = tiny_teacher().to(dtype)
        before = {name: tensor.clone() for name, tensor in router_parameters(teacher).items()}
        sar = router(teacher, student, learning_rate=1e-4)
        for step in range(12):
            sar(batches(count=1), step)
        now = router_parameters(teacher)
        moved[dtype] = sum(float((now[name] != before[name]).float().mean()) for name in now) / len(now)
    assert moved[torch.float32] > 0.9 and moved[torch.bfloat16] > 0.3, moved


def test_a_resumed_run_takes_the_same_steps() -> None:
    student, whole = tiny_student(), tiny_teacher()
    sar = router(whole, student)
    for step in range(4):
        sar(batches(), step)
        if step == 1:
            saved = save(sar.state())
    resumed = tiny_teacher()
    again = router(resumed, student)
    again.restore(load(saved))
    for step in (2, 3):
        again(batches(), step)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())
    ours, theirs = sar.state(), again.state()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_live_teacher_forgets_what_it_said_before_the_step() -> None:
    teacher = LiveTeacher(tiny_teacher(), Needs(), True)
    sar = StudentAwareRouter(tiny_student(), teacher, StudentAwareRouterConfig(learning_rate=RATE))
    rows = batches(count=1)
    before = teacher.run(rows[0]["input_ids"])
    sar(rows, 0)
    after = teacher.run(rows[0]["input_ids"])
    assert not torch.equal(before.hidden_BSD, after.hidden_BSD)


def test_the_teachers_folder_is_not_written(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "mixtral", vocab=VOCAB, with_tokenizer=False)
    digests = {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
    teacher = load_model(folder)
    router(teacher, tiny_model("mixtral", vocab=VOCAB, seed=1))(batches(), 0)
    assert digests == {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}


def test_padding_and_rows_without_labels_do_not_count() -> None:
    student, rows = tiny_student(), batches(count=1)
    ids_BS, mask_BS = rows[0]["input_ids"].clone(), torch.ones_like(rows[0]["input_ids"])
    mask_BS[1, 7:] = 0
    labels_BS = ids_BS.masked_fill(mask_BS == 0, -100)
    padded = {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": labels_BS}
    results = []
    for filler in (3, 50):
        teacher = tiny_teacher()
        row = padded | {"input_ids": ids_BS.masked_fill(mask_BS == 0, filler)}
        sar = router(teacher, student, beta=0.3)
        sar([row], 0)
        results.append(frozen(teacher))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    teacher = tiny_teacher()
    before = frozen(teacher)
    router(teacher, student)([padded | {"labels": torch.full_like(ids_BS, -100)}], 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_a_teacher_without_logits_is_refused() -> None:
    teacher = LiveTeacher(tiny_teacher(), Needs(layers=frozenset({0})), False)
    with pytest.raises(ConfigError, match="needs a loss on logits"):
        StudentAwareRouter(tiny_student(), teacher, StudentAwareRouterConfig())
