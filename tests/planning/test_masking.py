"""Masked KL: equal to pruning for real, zero for keep-all, the same rows for everybody, equal choices run once."""

import math

import pytest
import torch

from moe_edge.models.pruning import prune
from moe_edge.planning import masking
from moe_edge.planning.masking import MaskedKl, masked_kl, masked_kl_rows, row_kl
from tests.tiny import FAMILY_NAMES, tiny_model

KEPT = {0: [0, 2, 3, 5], 1: [1, 2, 4, 5]}
ALL = {0: list(range(6)), 1: list(range(6))}


@pytest.fixture
def ids():
    return torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_masking_predicts_the_pruned_model(family, ids):
    teacher, student = tiny_model(family), tiny_model(family)
    prune(student, KEPT)
    with torch.no_grad():
        p = teacher(ids).logits.double().log_softmax(-1)
        q = student(ids).logits.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean(-1)
    measured = masked_kl_rows(teacher, [KEPT, ALL], ids)
    torch.testing.assert_close(measured[0], expected, atol=1e-6, rtol=1e-5)
    assert measured[1].abs().max() < 1e-9 and measured[0].min() > 1e-4


def test_a_smaller_top_k_is_part_of_the_prediction(ids):
    teacher, student = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    prune(student, KEPT, top_k=1)
    with torch.no_grad():
        expected = row_kl(teacher(ids).logits, student(ids).logits)
    torch.testing.assert_close(masked_kl_rows(teacher, [KEPT], ids, top_k=1)[0], expected, atol=1e-6, rtol=1e-5)


def test_batches_of_rows_change_nothing(ids, monkeypatch):
    model = tiny_model("qwen3_moe")
    whole = masked_kl_rows(model, [KEPT], ids)
    monkeypatch.setattr(masking, "BATCH_LOGITS", 1)
    torch.testing.assert_close(masked_kl_rows(model, [KEPT], ids), whole, atol=1e-7, rtol=1e-5)


def test_equal_choices_run_once_and_the_teacher_once_per_batch(ids, monkeypatch):
    model = tiny_model("qwen3_moe")
    calls = []
    monkeypatch.setattr(masking, "logits_of", lambda m, rows: calls.append(1) or m(rows).logits.detach())
    result = masked_kl(model, {"a": KEPT, "b": {k: list(v) for k, v in KEPT.items()}, "c": ALL}, ids)
    assert len(calls) == 3 and result["a"] == result["b"] and result["c"].kl_nats == pytest.approx(0, abs=1e-9)
    low, high = result["a"].ci95
    assert low <= result["a"].kl_nats <= high and result["a"].n_tokens == 36


def test_a_single_row_has_no_interval(ids):
    assert masked_kl(tiny_model("qwen3_moe"), {"a": KEPT}, ids[:1])["a"].ci95 is None


def test_row_kl_matches_a_case_by_hand():
    p, q = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[math.log(3.0), 0.0]]])
    assert row_kl(p, q).item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))


def test_clearly_below_is_about_paired_differences():
    """Rows differ far more than the choices do, and the order is still certain."""
    base = (0.1, 1.0, 5.0, 9.0)
    ours = MaskedKl(3.775, None, 4, base)
    assert ours.clearly_below(MaskedKl(3.875, None, 4, tuple(value + 0.1 for value in base)))
    assert not ours.clearly_below(MaskedKl(3.775, None, 4, (0.2, 0.9, 5.1, 8.9)))
    assert not ours.clearly_below(ours)
