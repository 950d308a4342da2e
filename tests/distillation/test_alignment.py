"""Alignment, measured: which layers, the report of both ends, and the matrix of all pairs against a slow loop."""

import pytest
import torch

from moe_edge.distillation.alignment import aligned_layers, layer_cka, layer_cka_matrix
from moe_edge.formulas.cka import cka_across, gram, hsic_across, normalise_rows
from moe_edge.models.taps import body, recorded_activations
from tests.distillation.parts import VOCAB, rows, tiny_student, tiny_teacher
from tests.tiny import tiny_model


def test_layers_at_one_and_two_thirds() -> None:
    assert [aligned_layers(n) for n in (30, 4, 1)] == [[9, 19], [0, 2], [0]]


def test_report_is_one_for_the_teacher_itself_and_less_for_the_student() -> None:
    teacher, student = tiny_teacher(), tiny_student()
    assert layer_cka(teacher, teacher, rows()[:3]) == pytest.approx([1.0] * 3, abs=1e-4)
    values = layer_cka(student, teacher, rows()[:3])
    assert all(0 < value < 1 for value in values)


def test_a_layer_map_names_the_other_layer() -> None:
    teacher, student = tiny_teacher(), tiny_student()
    plain = layer_cka(student, teacher, rows()[:3])
    crossed = layer_cka(student, teacher, rows()[:3], {0: 0, 1: 2, 2: 2})
    assert crossed[0] == plain[0] and crossed[2] == plain[2] and crossed[1] != plain[1]


def test_the_matrix_equals_a_slow_loop_and_takes_any_depth_and_width() -> None:
    teacher = tiny_teacher()
    student = tiny_model("qwen3_moe", experts=4, layers=2, hidden=16, width=16, vocab=VOCAB)
    ids = torch.from_numpy(rows()[:3]).long()
    found = layer_cka_matrix(student, teacher, ids)
    assert found.shape == (2, 3)
    for j, layer in ((0, 2), (1, 0)):
        total = [torch.zeros(1, 1), torch.zeros(1), torch.zeros(1)]
        for row in ids:
            with (
                recorded_activations(student, [j]) as ours,
                recorded_activations(teacher, [layer]) as theirs,
                torch.no_grad(),
            ):
                body(student)(input_ids=row[None])
                body(teacher)(input_ids=row[None])
            # no token of the tiny models is a sink but the first
            sides = [gram(normalise_rows(s.layers[i][0, 1:])[None]) for s, i in ((ours, j), (theirs, layer))]
            total = [old + new for old, new in zip(total, hsic_across(*sides), strict=True)]
        assert float(found[j, layer]) == pytest.approx(float(cka_across(*total)), abs=1e-5)
    diagonal = layer_cka_matrix(teacher, teacher, ids).diagonal()
    assert diagonal.tolist() == pytest.approx([1.0] * 3, abs=1e-4)
