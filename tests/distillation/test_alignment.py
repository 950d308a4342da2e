"""The CKA term: which layers, what is heard, and that descending it aligns."""

from pathlib import Path

import pytest
import torch

from moe_edge.distillation.alignment import TeacherLayers, aligned_layers, alignment_loss, layer_cka, listening
from moe_edge.families.taps import body
from tests.distillation.parts import rows, tiny_student, tiny_teacher
from tests.tiny import tiny_checkpoint, tiny_ids


def test_layers_at_one_and_two_thirds() -> None:
    assert [aligned_layers(n) for n in (30, 4, 1)] == [[9, 19], [0, 2], [0]]


def test_the_truncated_teacher_says_what_the_whole_one_says(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen2_moe", with_tokenizer=False, layers=3)
    layers = TeacherLayers(folder, [0, 1], torch.device("cpu"), torch.float32)
    ids = tiny_ids()
    ours = layers.features(ids)
    from tests.tiny import tiny_model

    teacher = tiny_model("qwen2_moe", layers=3)
    with listening(teacher, [0, 1]) as heard, torch.no_grad():
        teacher(ids)
    assert set(ours) == {0, 1}
    for layer in (0, 1):
        assert torch.equal(ours[layer], heard[layer])
    assert not any(parameter.requires_grad for parameter in layers._body.parameters())


def test_descending_the_loss_aligns() -> None:
    teacher, student = tiny_teacher(), tiny_student()
    ids = torch.from_numpy(rows()[:2]).long()
    with listening(teacher, [1]) as target, torch.no_grad():
        body(teacher)(input_ids=ids)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    values = []
    for _ in range(6):
        with listening(student, [1]) as heard:
            body(student)(input_ids=ids)
        loss = alignment_loss(heard, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < values[0]


def test_report_is_one_for_the_teacher_itself_and_less_for_the_student() -> None:
    teacher, student = tiny_teacher(), tiny_student()
    assert layer_cka(teacher, teacher, rows()[:3]) == pytest.approx([1.0] * 3, abs=1e-4)
    values = layer_cka(student, teacher, rows()[:3])
    assert all(0 < value < 1 for value in values)
