"""Feature terms: what they compare, padding, layer maps, refusals, and that descending them aligns."""

from typing import Any

import pytest
import torch

from moe_edge.contracts.config import StageConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.feature_terms import FEATURE_TERMS, FeatureTerm, spread
from moe_edge.distillation.teacher import LiveTeacher
from moe_edge.distillation.terms import MicroBatch, Term, TermContext, TermInputs
from moe_edge.formulas.cka_loss import cka_pair, kept_tokens
from moe_edge.models.taps import body, recorded_activations
from tests.distillation.parts import VOCAB, rows, tiny_student, tiny_teacher
from tests.tiny import tiny_model

IDS = torch.from_numpy(rows()[:2]).long()
NAMES = sorted(FEATURE_TERMS)


def context(student: Any = None, teacher: Any = None, **stage: Any) -> TermContext:
    student, teacher = student or tiny_student(), teacher or tiny_teacher()
    inputs = TermInputs(ids_NS=torch.from_numpy(rows()[:3]))
    return TermContext(student, teacher, StageConfig(stage_name="s", **stage), inputs)


def judged(term: Term, student: Any, teacher: LiveTeacher, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    """The loss of one micro-batch, as the trainer asks for it."""
    with term.recording(student):
        body(student)(input_ids=ids, attention_mask=mask, use_cache=False)
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return term.loss(MicroBatch(ids, valid, teacher.run(ids, mask)))


def test_cka_is_the_mean_over_aligned_layers_and_rows() -> None:
    given = context()
    term = FEATURE_TERMS["cka"](given)
    assert term.layers == {0: 0, 1: 1} and set(term.needs.layers) == {0, 1} and term.sampled
    with (
        recorded_activations(given.student, [0, 1]) as ours,
        recorded_activations(given.teacher, [0, 1]) as theirs,
        torch.no_grad(),
    ):
        body(given.student)(input_ids=IDS)
        body(given.teacher)(input_ids=IDS)
    expected = []
    for layer in (0, 1):
        for row in range(2):
            keep = kept_tokens(theirs.layers[layer][row])
            expected.append(1 - cka_pair(ours.layers[layer][row][keep], theirs.layers[layer][row][keep]))
    loss = judged(term, given.student, LiveTeacher(given.teacher, term.needs, False), IDS)
    torch.testing.assert_close(loss, torch.stack(expected).mean())


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name: str) -> None:
    given = context()
    term = FEATURE_TERMS[name](given)
    teacher = LiveTeacher(given.teacher, term.needs, False)
    plain = judged(term, given.student, teacher, IDS)
    padded = torch.cat([IDS, torch.full((2, 5), 7)], dim=1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(2, 5, dtype=torch.long)], dim=1)
    torch.testing.assert_close(judged(term, given.student, teacher, padded, mask), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_zero_for_the_teacher_itself_and_descending_aligns(name: str) -> None:
    given = context()
    term = FEATURE_TERMS[name](given)
    teacher = LiveTeacher(given.teacher, term.needs, False)
    assert float(judged(term, tiny_teacher(), teacher, IDS).detach()) == pytest.approx(0.0, abs=1e-4)
    optimizer = torch.optim.Adam(given.student.parameters(), lr=3e-3)
    values = []
    for _ in range(8):
        loss = judged(term, given.student, teacher, IDS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[0] > 0.005 and values[-1] < 0.8 * values[0]


def test_a_dear_distance_sees_a_spread_of_the_tokens() -> None:
    seen: list[int] = []

    def distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        seen.append(len(student))
        return (student - teacher).square().mean()

    given = context()
    for most in (None, 5):
        term = FeatureTerm("mine", distance, {1: 1}, most)
        judged(term, given.student, LiveTeacher(tiny_teacher(), term.needs, False), IDS)
    assert seen == [15, 15, 5, 5]
    assert spread(torch.arange(10, 20), 4).tolist() == [10, 13, 16, 19]


def test_a_row_of_too_few_tokens_says_nothing() -> None:
    given = context()
    term = FEATURE_TERMS["cka"](given)
    loss = judged(term, given.student, LiveTeacher(given.teacher, term.needs, False), IDS[:, :4])
    loss.backward()
    assert float(loss.detach()) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_no_term_leaves_anything_in_the_student(name: str) -> None:
    given = context()
    keys, modules = list(given.student.state_dict()), len(list(given.student.modules()))
    term = FEATURE_TERMS[name](given)
    judged(term, given.student, LiveTeacher(given.teacher, term.needs, False), IDS).backward()
    assert list(given.student.state_dict()) == keys and len(list(given.student.modules())) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in given.student.modules())


def deeper_teacher() -> Any:
    return tiny_model("qwen3_moe", experts=4, layers=6, hidden=32, width=16, vocab=VOCAB, tied=True)


def test_layer_maps() -> None:
    assert context().layer_map == {0: 0, 1: 1, 2: 2}
    assert context(teacher=deeper_teacher(), layer_map="proportional").layer_map == {0: 1, 1: 3, 2: 5}
    with pytest.raises(ConfigError, match="equal depth"):
        FEATURE_TERMS["cka"](context(teacher=deeper_teacher()))
    with pytest.raises(ValueError, match="rows of text"):
        _ = TermContext(tiny_student(), tiny_teacher(), StageConfig(stage_name="s", layer_map="auto")).layer_map


def test_the_measured_map_finds_the_layers_that_a_student_has_kept() -> None:
    teacher, student = deeper_teacher(), deeper_teacher()
    del student.model.layers[3:5]
    del student.model.layers[0:1]
    given = context(student, teacher, layer_map="auto")
    found = list(given.layer_map.values())
    assert found == sorted(found) and len(found) == 3
    same = context(deeper_teacher(), teacher, layer_map="auto").layer_map
    assert same == {layer: layer for layer in range(6)}
    term = FEATURE_TERMS["procrustes"](given)
    assert set(term.needs.layers) == {given.layer_map[0], given.layer_map[1]}


def test_widths() -> None:
    narrow = tiny_model("qwen3_moe", experts=4, layers=3, hidden=16, width=16, vocab=VOCAB)
    for name in ("mse", "cosine"):
        with pytest.raises(ConfigError, match="equal widths"):
            FEATURE_TERMS[name](context(narrow))
    for name in ("cka", "procrustes"):
        given = context(narrow)
        term = FEATURE_TERMS[name](given)
        loss = judged(term, narrow, LiveTeacher(given.teacher, term.needs, False), IDS)
        loss.backward()
        assert 0 < float(loss.detach()) <= 1.1 and narrow.model.embed_tokens.weight.grad.any()
