"""Expert-to-layer CKA: against the loss's own pairwise form, for students of other widths, and as a table."""

import json

import pytest
import torch

from moe_edge.distillation.expert_layers import expert_layer_cka, expert_layer_table, write_expert_layer_table
from moe_edge.formulas.cka import cka_from_hsic, hsic_all_pairs, normalise_rows, sink_mask
from moe_edge.models.taps import decoder_layers
from moe_edge.models.views import expert_outputs, moe_layers
from tests.tiny import tiny_ids, tiny_model


def test_one_row_equals_the_pairwise_reference():
    teacher, student = tiny_model("qwen3_moe"), tiny_model("qwen3_moe", layers=3, hidden=32, seed=1)
    ids = tiny_ids(tokens=40, rows=1)
    found = expert_layer_cka(teacher, student, ids)
    assert found.shape == (2, 6, 3)
    hidden, streams = {}, {}
    views = moe_layers(teacher)
    for view in views:
        view.experts.register_forward_pre_hook(lambda _m, inputs, i=view.position: hidden.update({i: inputs[0]}))
    for index, layer in enumerate(decoder_layers(student)):
        layer.register_forward_hook(lambda _m, _i, output, i=index: streams.update({i: output[0]}))
    with torch.no_grad():
        teacher(ids), student(ids)
    position = torch.arange(40)
    sink = torch.stack([sink_mask(each, position) for each in (*hidden.values(), *streams.values())]).any(dim=0)
    for view in views:
        outputs = expert_outputs(view, hidden[view.position])
        for expert in range(6):
            for layer in range(3):
                sides = [normalise_rows(side[~sink]) for side in (outputs[expert], streams[layer])]
                width = max(side.shape[1] for side in sides)
                padded = torch.stack([torch.nn.functional.pad(side, (0, width - side.shape[1])) for side in sides])
                expected = cka_from_hsic(hsic_all_pairs(padded))[0, 1]
                assert float(found[view.position, expert, layer]) == pytest.approx(float(expected), abs=1e-5)


def test_a_layer_that_is_one_expert_finds_it():
    """A student whose last layer writes nothing but a multiple of one teacher expert's output."""
    teacher = tiny_model("qwen3_moe", layers=1)
    view, ids = moe_layers(teacher)[0], tiny_ids(tokens=60, rows=3)
    heard = {}
    view.experts.register_forward_pre_hook(lambda _m, inputs: heard.update(hidden=inputs[0]))
    student = tiny_model("qwen3_moe", layers=1)
    decoder_layers(student)[0].register_forward_hook(
        lambda *_: 2.5 * expert_outputs(view, heard["hidden"], [4])[0][None]
    )
    found = expert_layer_cka(teacher, student, ids)[0, :, 0]
    assert int(found.argmax()) == 4 and float(found[4]) == pytest.approx(1.0, abs=1e-4)


def test_blocks_are_summed_before_they_are_divided(monkeypatch):
    teacher, student, ids = tiny_model("qwen3_moe"), tiny_model("qwen3_moe", seed=1), tiny_ids(tokens=100, rows=4)
    whole = expert_layer_cka(teacher, student, ids)
    monkeypatch.setattr("moe_edge.distillation.expert_layers.BLOCK_TOKENS", 33)
    parts = expert_layer_cka(teacher, student, ids)
    assert not torch.equal(whole, parts)
    torch.testing.assert_close(parts, whole, atol=0.15, rtol=0)


def test_the_table_ranks_and_leaves_out_what_is_unknown():
    cka = torch.tensor([[[0.2, 0.9], [float("nan"), 0.1]], [[0.8, 0.3], [0.5, 0.4]]])
    table = expert_layer_table(cka, [1, 4], top=3)["student_layers"]
    assert [(row["teacher_layer"], row["expert"], row["rank"]) for row in table["0"]] == [
        (4, 0, 1),
        (4, 1, 2),
        (1, 0, 3),
    ]
    assert [row["cka"] for row in table["1"]] == pytest.approx([0.9, 0.4, 0.3])
    only = expert_layer_table(cka[:1], [1], top=3)["student_layers"]["0"]
    assert [(row["teacher_layer"], row["expert"]) for row in only] == [(1, 0)]


def test_the_table_is_written_as_it_is(tmp_path):
    teacher, ids = tiny_model("qwen2_moe"), tiny_ids(tokens=30)
    measured = expert_layer_cka(teacher, teacher, ids)
    write_expert_layer_table(tmp_path / "expert_layers.json", teacher, measured, ids.numel(), top=2)
    table = json.loads((tmp_path / "expert_layers.json").read_text())
    assert table == expert_layer_table(measured, [0, 1], top=2) | {"tokens": 60}
    assert table["tokens"] == 60 and len(table["student_layers"]["1"]) == 2
