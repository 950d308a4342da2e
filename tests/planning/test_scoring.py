"""Masked KL: equal to pruning for real, zero for keep-all, the same rows for everybody, equal choices run once; and the same
layer by layer."""

import math
from pathlib import Path

import pytest
import torch

from moe_edge.contracts.artifacts import Placement
from moe_edge.contracts.errors import ConfigError
from moe_edge.models.loading import load_model
from moe_edge.models.pruning import prune
from moe_edge.models.streaming import StreamedModel
from moe_edge.models.views import moe_layers
from moe_edge.planning import scoring
from moe_edge.planning.scoring import (
    MaskedKl,
    StreamedScorer,
    WholeScorer,
    masked_kl_rows,
    open_scorer,
    row_kl,
    streamed_masked_kl_rows,
)
from tests.tiny import ALL_FAMILIES, FAMILY_NAMES, tiny_checkpoint, tiny_ids, tiny_model

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
    monkeypatch.setattr(scoring, "BATCH_LOGITS", 1)
    torch.testing.assert_close(masked_kl_rows(model, [KEPT], ids), whole, atol=1e-7, rtol=1e-5)


def test_equal_choices_run_once_and_the_teacher_once_per_batch(ids, monkeypatch):
    model = tiny_model("qwen3_moe")
    calls = []
    monkeypatch.setattr(scoring, "logits_of", lambda m, rows: calls.append(1) or m(rows).logits.detach())
    result = WholeScorer(model).masked_kl({"a": KEPT, "b": {k: list(v) for k, v in KEPT.items()}, "c": ALL}, ids)
    assert len(calls) == 3 and result["a"] == result["b"] and result["c"].kl_nats == pytest.approx(0, abs=1e-9)
    low, high = result["a"].ci95
    assert low <= result["a"].kl_nats <= high and result["a"].n_tokens == 36


def test_a_single_row_has_no_interval(ids):
    assert WholeScorer(tiny_model("qwen3_moe")).masked_kl({"a": KEPT}, ids[:1])["a"].ci95 is None


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


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_layer_by_layer_it_equals_the_masked_kl_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, family, with_tokenizer=False, layers=3, dtype=torch.bfloat16)
    model, ids = load_model(folder), tiny_ids(12, 6)
    groups = moe_layers(model)[0].groups[0]
    layers = [view.index for view in moe_layers(model)]
    fewer = [0, 1, 2, 3, 4] if groups == 1 else [0, 1, 3, 4]
    choices = [{}, dict.fromkeys(layers, fewer), {layers[-1]: fewer}]
    expected = masked_kl_rows(model, choices, ids)
    for compact in (False, True):
        teacher = StreamedModel(folder, compact=compact)
        found = streamed_masked_kl_rows(teacher, choices, ids, tmp_path)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
        assert found[1].mean() > 1e-4 and found[0].abs().max() < 1e-6
    assert not list(tmp_path.glob("masked-*"))


def test_both_scorers_agree_on_named_choices_at_another_top_k(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen2_moe", with_tokenizer=False)
    choices = {"a": {0: [0, 1, 2], 1: [3, 4, 5]}, "b": {}, "again": {0: [0, 1, 2], 1: [3, 4, 5]}}
    expected = WholeScorer(load_model(folder)).masked_kl(choices, tiny_ids(12, 5), top_k=1)
    found = StreamedScorer(StreamedModel(folder), tmp_path).masked_kl(choices, tiny_ids(12, 5), top_k=1)
    assert list(found) == list(expected)
    for name, result in expected.items():
        assert found[name].kl_nats == pytest.approx(result.kl_nats, rel=1e-4)
        assert found[name].ci95 == pytest.approx(result.ci95, rel=1e-3) and found[name].n_tokens == 60


def test_an_impossible_choice_is_refused_before_any_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = StreamedModel(tiny_checkpoint(tmp_path, "olmoe", with_tokenizer=False))
    monkeypatch.setattr(teacher, "loaded", lambda part: pytest.fail("read"))
    with pytest.raises(ConfigError):
        streamed_masked_kl_rows(teacher, [{0: [0]}], tiny_ids(), tmp_path)


@pytest.mark.parametrize("mode", ["whole", "streamed"])
def test_a_scorer_is_opened_as_it_was_placed_and_leaves_nothing(tmp_path: Path, mode: str) -> None:
    folder, scratch = tiny_checkpoint(tmp_path / "teacher", "qwen3_moe", with_tokenizer=False), tmp_path / "scratch"
    scratch.mkdir()
    with open_scorer(folder, Placement(mode=mode), scratch) as scorer:
        assert (scorer.model is None) == (mode == "streamed")
        found = scorer.masked_kl({"a": KEPT}, tiny_ids(12, 2))
    expected = WholeScorer(load_model(folder)).masked_kl({"a": KEPT}, tiny_ids(12, 2))
    assert found["a"].kl_nats == pytest.approx(expected["a"].kl_nats, rel=1e-4)
    assert list(scratch.iterdir()) == []
