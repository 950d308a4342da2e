"""Scores of a set: nothing is skipped, nothing divides by zero, mismatches are errors, intervals hold the value."""

import json
from typing import Any

import numpy as np
import pytest

from moe_edge.contracts.errors import InputRejected
from moe_edge.metrics import text
from moe_edge.metrics.text import METRICS, judged_rows, score_set
from moe_edge.metrics.text_answers import Answer, failed, judge_answer
from moe_edge.metrics.text_modules import compute
from moe_edge.texts.instruction_rows import InstructionRow

OPTIONS: dict[str, dict[str, Any]] = {name: {} for name in METRICS if name != "bertscore"}
REFERENCES = [("the cat sat on the mat",), ("a dog", "two dogs ran"), ("Paris",), ("three little pigs went home",)]


def rows(references: list[tuple[str, ...]], categories: list[str | None] | None = None) -> list[InstructionRow]:
    categories = categories or [None] * len(references)
    return [
        InstructionRow(f"set:{at}", f"prompt {at}", one, category)
        for at, (one, category) in enumerate(zip(references, categories, strict=True), 1)
    ]


def answered(texts: list[str], **fields: Any) -> dict[str, Answer]:
    return {
        f"set:{at}": judge_answer(range(9), one, 32) if one else judge_answer([], "", 32)
        for at, one in enumerate(texts, 1)
    } | fields


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BOOTSTRAP_SAMPLES", 200)


def test_right_answers_score_a_hundred() -> None:
    result = score_set(rows(REFERENCES), {"10": answered([one[-1] for one in REFERENCES])}, OPTIONS)
    for name, metric in result["metrics"].items():
        assert metric["value"] == pytest.approx(100), name
        assert metric["ci95"] == pytest.approx([100, 100]) and metric["reason"] is None
    assert result["counts"]["empty_rate"] == 0 and result["counts"]["statuses"]["ok"] == 4
    json.dumps(result, allow_nan=False)


def test_an_empty_answer_is_a_zero_that_is_counted() -> None:
    """Three right answers of four: skipping the empty one would say 100."""
    texts = [one[0] for one in REFERENCES[:3]] + [""]
    result = score_set(rows(REFERENCES), {"10": answered(texts)}, OPTIONS)
    for name in ("rouge_l", "chrf", "exact_match"):
        assert result["metrics"][name]["value"] == pytest.approx(75), name
        assert result["metrics"][name]["mean_nonempty"] == pytest.approx(100), name
    assert result["metrics"]["bleu"]["value"] < 75
    counts = result["counts"]
    assert (counts["n"], counts["n_answers"], counts["n_empty"], counts["empty_rate"]) == (4, 4, 1, 0.25)


@pytest.mark.parametrize("texts", [[""] * 4, ["\x00", " ", "", "\n"]])
def test_only_empty_answers(texts: list[str]) -> None:
    """The student of the first seed: every metric is 0 with an interval, none is null and none divides by zero."""
    result = score_set(rows(REFERENCES), {"10": answered(texts), "20": answered(texts)}, OPTIONS)
    for metric in result["metrics"].values():
        assert metric["value"] == 0 and metric["ci95"] == [0, 0] and metric["mean_nonempty"] is None
        assert metric["by_seed"] == {"10": 0, "20": 0} and metric["std_over_seeds"] == 0
    counts = result["counts"]
    assert counts["empty_rate"] == 1 and counts["n_empty"] == counts["n_answers"] == 8
    json.dumps(result, allow_nan=False)


def test_a_set_without_references_is_counted_and_its_scores_are_null_with_a_reason() -> None:
    for empty, answers in (([], {}), (rows([(), ()]), answered(["a", "b"]))):
        result = score_set(empty, {"10": answers}, OPTIONS)
        for metric in result["metrics"].values():
            assert metric["value"] is None and metric["ci95"] is None and metric["reason"] == "no row with a reference"
        counts = result["counts"]
        assert (counts["empty_rate"], bool(counts["reason"])) == ((0, False) if empty else (None, True))
        assert (counts["n_answers"], counts["n_excluded_empty_reference"]) == (len(empty), 0)
        json.dumps(result, allow_nan=False)


def test_rows_without_reference_are_left_out_and_named() -> None:
    given = rows([REFERENCES[0], (), REFERENCES[2]])
    answers = {key: one for key, one in answered(["the cat sat on the mat", "x", "Rome"]).items() if key != "set:2"}
    result = score_set(given, {"10": answers}, OPTIONS)
    assert result["counts"]["n"] == 2 and result["counts"]["n_rows"] == 3
    assert result["counts"]["excluded_rows"] == ["set:2"]
    assert result["metrics"]["exact_match"]["value"] == 50


def test_rows_without_reference_can_ask_for_nothing() -> None:
    given = rows([("Paris",), (), ()])
    assert len(judged_rows(given, "score")) == 3
    result = score_set(given, {"10": answered(["Paris", "", "words"])}, OPTIONS, "score")
    assert result["metrics"]["exact_match"]["value"] == pytest.approx(200 / 3)
    assert result["metrics"]["bleu"]["value"] == pytest.approx(100)  # corpus counts of the one row with a reference
    only = score_set(rows([(), ()]), {"10": answered(["", "words"])}, OPTIONS, "score")
    assert {metric["value"] for metric in only["metrics"].values()} == {50}


@pytest.mark.parametrize(
    ("keys", "words"), [(["set:1", "set:2"], "set:3"), (["set:1", "set:2", "set:3", "set:9"], "set:9"), ([], "set:1")]
)
def test_a_mismatch_is_an_error_that_names_the_rows(keys: list[str], words: str) -> None:
    answers = dict.fromkeys(keys, judge_answer([1], "x", 9))
    with pytest.raises(InputRejected, match=words) as caught:
        score_set(rows(REFERENCES[:3]), {"10": answers}, OPTIONS)
    assert "run 10" in str(caught.value)


def test_failures_and_loops_are_counted_and_score_what_they_say() -> None:
    answers = answered(["the cat sat on the mat", "a dog", "", ""])
    answers["set:3"] = failed(RuntimeError("broken"))
    answers["set:4"] = judge_answer([1, 2] * 16, "pigs " * 16, 32)
    result = score_set(rows(REFERENCES), {"10": answers}, OPTIONS)
    counts = result["counts"]
    assert counts["statuses"] == {
        "exception": 1,
        "decode_error": 0,
        "empty": 0,
        "repeated": 1,
        "truncated": 0,
        "ok": 2,
    }
    assert (counts["n_empty"], counts["n_truncated"], counts["repeated_rate"]) == (1, 1, 0.25)
    assert counts["looping_tokens"] == 8 and 0 < result["metrics"]["rouge_l"]["value"] < 75
    assert sum(counts["statuses"].values()) == counts["n_answers"]


def test_several_seeds() -> None:
    """The value is the mean over runs; BLEU is the corpus score of each run, not the mean of rows."""
    runs = {"10": ["the cat sat", "a dog", "Rome", "three"], "20": ["on the mat", "dogs ran", "Paris", ""]}
    result = score_set(rows(REFERENCES), {seed: answered(texts) for seed, texts in runs.items()}, OPTIONS)
    for name, metric in result["metrics"].items():
        each = {seed: compute(name, texts, [list(one) for one in REFERENCES])["score"] for seed, texts in runs.items()}
        assert metric["by_seed"] == pytest.approx(each), name
        assert metric["value"] == pytest.approx(np.mean(list(each.values())))
        assert metric["std_over_seeds"] == pytest.approx(np.std(list(each.values()), ddof=1))
        assert metric["ci95"][0] <= metric["value"] <= metric["ci95"][1]
    assert result["counts"]["n_answers"] == 8


def test_categories_are_scored_by_themselves() -> None:
    given = rows(REFERENCES, ["a", "b", "a", None])
    result = score_set(given, {"10": answered(["the cat sat on the mat", "", "Rome", "x"])}, OPTIONS)
    a, b = result["categories"]["a"], result["categories"]["b"]
    assert list(result["categories"]) == ["a", "b"]
    assert a["counts"]["n"] == 2 and a["metrics"]["exact_match"]["value"] == 50
    assert b["counts"]["empty_rate"] == 1 and b["metrics"]["rouge_l"]["value"] == 0
    assert b["metrics"]["rouge_l"]["ci95"] is None  # a single row has no interval


def test_references_that_rouge_cannot_read_are_counted() -> None:
    result = score_set(rows([("你好",), ("hello",)]), {"10": answered(["你好", "hello"])}, OPTIONS)
    assert result["counts"]["n_outside_rouge"] == 1
    assert result["metrics"]["rouge_l"]["value"] == 50 and result["metrics"]["chrf"]["value"] == pytest.approx(100)
