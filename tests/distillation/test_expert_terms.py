"""Expert terms: the loss against a slow loop, its groups, gradients, refusals, and that diversity falls."""

from typing import Any

import pytest
import torch

from moe_edge.contracts.config import StageConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.expert_terms import EXPERT_TERMS, sampled_tokens
from moe_edge.distillation.teacher import LiveTeacher
from moe_edge.distillation.terms import MicroBatch, TeacherActivations, TermContext, TermInputs
from moe_edge.formulas.cka_loss import cka_pair
from moe_edge.formulas.ffn import Ffn
from moe_edge.models.dense import build_dense
from moe_edge.models.shared_core import shared_core_model
from moe_edge.models.taps import body
from moe_edge.models.views import expert_outputs, moe_layers, router_scores
from tests.distillation.parts import VOCAB, rows, tiny_student, tiny_teacher
from tests.distillation.test_feature_terms import IDS, judged
from tests.tiny import tiny_ids, tiny_model

KEPT = [0, 2, 3]  # of parts.tiny_student


def context(student: Any = None, teacher: Any = None, table: Any = None, **stage: Any) -> TermContext:
    student, teacher, ids = student or tiny_student(), teacher or tiny_teacher(), torch.from_numpy(rows())
    return TermContext(student, teacher, StageConfig(stage_name="s", **stage), TermInputs(None, ids, table))


def test_every_kept_expert_finds_itself_and_the_dropped_one_joins_somebody() -> None:
    term = EXPERT_TERMS["expert_cka"](context())
    assert [layer.teacher.index for layer in term.layers] == [0, 1] and set(term.needs.routers) == {0, 1}
    for layer in term.layers:
        owners = layer.owner_C.tolist()
        assert [owners[expert] for expert in KEPT] == [0, 1, 2] and owners[1] in (0, 1, 2)
        assert float(layer.weight_J.sum()) == pytest.approx(1.0)


def test_the_loss_equals_a_slow_loop() -> None:
    given = context()
    term = EXPERT_TERMS["expert_cka"](given)
    teacher = LiveTeacher(given.teacher, term.needs, False)
    loss, expected = judged(term, given.student, teacher, IDS), []
    for layer in term.layers:
        hidden = sampled_tokens(teacher.run(IDS).expert_inputs[layer.teacher.index], torch.ones_like(IDS).bool())
        theirs, gates = expert_outputs(layer.teacher, hidden), router_scores(layer.teacher, hidden)
        total = 0.0
        for j, own in enumerate(expert_outputs(layer.student, hidden)):
            group = [i for i, owner in enumerate(layer.owner_C.tolist()) if owner == j]
            mean = sum(gates[:, i, None] * theirs[i] for i in group) / sum(gates[:, i, None] for i in group)
            total += float(layer.weight_J[j]) * (1 - float(cka_pair(own, mean)))
        expected.append(total)
    assert float(loss.detach()) == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_zero_for_the_teacher_itself() -> None:
    given = context(tiny_teacher())
    term = EXPERT_TERMS["expert_cka"](given)
    assert [layer.owner_C.tolist() for layer in term.layers] == [[0, 1, 2, 3]] * 2
    loss = judged(term, given.student, LiveTeacher(given.teacher, term.needs, False), IDS)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-4)


def test_gradients_reach_the_experts_alone_and_descending_aligns() -> None:
    given = context(tiny_model("qwen3_moe", experts=3, layers=3, hidden=32, width=16, vocab=VOCAB, tied=True, seed=9))
    term = EXPERT_TERMS["expert_cka"](given)
    teacher = LiveTeacher(given.teacher, term.needs, False)
    optimizer, values = torch.optim.Adam(given.student.parameters(), lr=1e-2), []
    for _ in range(10):
        loss = judged(term, given.student, teacher, IDS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    moved = {name for name, p in given.student.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {f"model.layers.{i}.mlp.experts.{n}_proj" for i in (0, 1) for n in ("gate_up", "down")}
    assert values[-1] < 0.8 * values[0]


def test_only_a_share_of_the_experts_may_teach() -> None:
    table = torch.zeros(3, 4, 3, dtype=torch.float64)
    table[0, 3, 0], table[0, 1, 0], table[1, 0, 1], table[1, 2, 1] = 0.9, 0.5, 0.8, torch.nan
    term = EXPERT_TERMS["expert_cka"](context(table=table, expert_share=0.5))
    assert [layer.chosen for layer in term.layers] == [[1, 3], [0, 1]]
    for layer in term.layers:
        assert len(set(layer.owner_C.tolist())) == 2 and int((layer.weight_J > 0).sum()) <= 2
    with pytest.raises(ValueError, match="expert-to-layer CKA"):
        EXPERT_TERMS["expert_cka"](context(expert_share=0.5))


def test_students_that_it_does_not_fit() -> None:
    teacher = tiny_teacher()
    networks = [Ffn(torch.randn(8, 32), torch.randn(8, 32), torch.randn(32, 8)) for _ in range(3)]
    dense = build_dense(tiny_teacher(), networks)
    for name in EXPERT_TERMS:
        with pytest.raises(ConfigError, match=r"needs a student with routers and experts[\s\S]*dense"):
            EXPERT_TERMS[name](context(dense, teacher))
    narrow = tiny_model("qwen3_moe", experts=4, layers=3, hidden=16, width=16, vocab=VOCAB)
    with pytest.raises(ConfigError, match="16 wide, not 32"):
        EXPERT_TERMS["expert_cka"](context(narrow))
    single = tiny_model("qwen3_moe", experts=1, top_k=1, layers=3, hidden=32, width=16, vocab=VOCAB)
    with pytest.raises(ConfigError, match="single expert"):
        EXPERT_TERMS["expert_diversity"](context(single))


def test_dense_first_layers_are_passed_over() -> None:
    teacher = tiny_model("deepseek_v3", experts=8, layers=4, hidden=32, width=16, vocab=VOCAB)
    term = EXPERT_TERMS["expert_cka"](context(teacher, teacher))
    assert {layer.teacher.index for layer in term.layers} <= {view.index for view in moe_layers(teacher)}
    with pytest.raises(ConfigError, match="no student layer with experts"):
        EXPERT_TERMS["expert_cka"](_cut(teacher))


def _cut(teacher: Any) -> TermContext:
    """A student of two MoE layers, whose places in the teacher are dense."""
    student = tiny_model("deepseek_v3", experts=8, layers=4, hidden=32, width=16, vocab=VOCAB)
    given = context(student, teacher)
    given.__dict__["layer_map"] = dict.fromkeys(range(4), 0)
    return given


def inter_expert_cka(term: Any, student: Any, ids: torch.Tensor) -> torch.Tensor:
    with term.recording(student):
        body(student)(input_ids=ids, use_cache=False)
    return term.loss(MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool), TeacherActivations()))


def test_diversity_lowers_the_cka_between_experts_on_text_not_trained_on() -> None:
    student, unseen = tiny_student(), tiny_ids(64, 2, VOCAB, seed=5)
    with torch.no_grad():
        for view in moe_layers(student):  # experts that are nearly copies of each other
            view.experts.gate_up_proj.copy_(view.experts.gate_up_proj[:1] + 0.3 * view.experts.gate_up_proj)
            view.experts.down_proj.copy_(view.experts.down_proj[:1] + 0.3 * view.experts.down_proj)
    term = EXPERT_TERMS["expert_diversity"](context(student))
    before = float(inter_expert_cka(term, student, unseen).detach())
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for step in range(10):
        loss = inter_expert_cka(term, student, torch.from_numpy(rows()[2 * step : 2 * step + 2]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before > 0.6 and float(inter_expert_cka(term, student, unseen).detach()) < 0.7 * before
    assert student.model.embed_tokens.weight.grad is None


@pytest.mark.parametrize("name", sorted(EXPERT_TERMS))
def test_nothing_is_left_in_the_student_and_shared_cores_train(name: str) -> None:
    for student in (tiny_student(), _shared(tiny_student())):
        given = context(student)
        keys = list(student.state_dict())
        term = EXPERT_TERMS[name](given)
        judged(term, student, LiveTeacher(given.teacher, term.needs, False), IDS).backward()
        assert list(student.state_dict()) == keys
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
        assert any(".experts." in n and p.grad is not None and p.grad.any() for n, p in student.named_parameters())


def _shared(model: Any) -> Any:
    model = shared_core_model(model, rank=4)
    with torch.no_grad():
        for view in moe_layers(model):
            for parameter in view.experts.parameters():
                parameter.normal_(std=0.2)
    return model


def test_sampled_tokens_are_spread_and_leave_padding_and_first_positions_out() -> None:
    hidden = torch.arange(40.0).view(20, 2) + 1
    valid = torch.tensor([[True] * 10, [True] * 6 + [False] * 4])
    found = sampled_tokens(hidden, valid, most=5)
    positions = [int(row[0] - 1) // 2 for row in found]
    assert positions == sorted(set(positions)) and positions[0] == 1 and positions[-1] == 15 and len(positions) == 5
    assert len(sampled_tokens(hidden, valid)) == 14
