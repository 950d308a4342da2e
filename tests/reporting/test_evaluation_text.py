"""The page of an evaluation: scores with intervals, what became of the answers, categories, and reasons for what is missing."""

from moe_edge.contracts.evaluation import Evaluation
from moe_edge.reporting.evaluation_text import evaluation_text

COUNTS = {
    "n": 3,
    "n_answers": 6,
    "statuses": {"ok": 4, "exception": 1, "decode_error": 1},
    "n_empty": 3,
    "empty_rate": 0.5,
    "n_truncated": 0,
    "truncated_rate": 0.0,
    "repeated_rate": None,
    "distinct_4": 0.75,
    "looping_tokens": 0.0,
    "mean_tokens": 12.0,
    "reason": None,
}
OF_SET = {"n_rows": 4, "n_excluded_empty_reference": 1, "excluded_rows": ["four"], "n_outside_rouge": 0}
KNOWN = {
    "value": 12.345,
    "ci95": (10.0, 15.0),
    "by_seed": {"10": 12.0},
    "std_over_seeds": None,
    "mean_nonempty": None,
    "reason": None,
}
UNKNOWN = KNOWN | {"value": None, "ci95": None, "reason": "no row with a reference"}


def evaluation(**changes: object) -> Evaluation:
    metrics = {"rouge_l": KNOWN, "bleu": UNKNOWN}
    one = {"path": "p", "sha256": "s", "counts": COUNTS | OF_SET, "metrics": metrics, "categories": {}}
    values: dict[str, object] = {
        "schema": "moe-edge/evaluate@1",
        "verdict": "fail",
        "reasons": ["a: empty"],
        "artifact": {"path": "x|y", "format": "hf", "runtime": "hf", "bytes": 1, "digest": "d"},
        "protocol": {
            "runs": ["10", "20"],
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "max_prompt_tokens": 48,
            "max_new_tokens": 6,
            "is_minillm_contract": False,
        },
        "sets": {"a": one},
        "average": {"rouge_l": {"value": 12.345, "reason": None}, "bleu": {"value": None, "reason": "none for a"}},
        "gates": [],
        "encoder": None,
        "definitions": {},
        "notes": ["<b> said"],
        "machine": {},
        "versions": {},
    }
    if changes.pop("category", False):
        values["sets"] = {"a": one | {"categories": {"facts": {"counts": COUNTS, "metrics": metrics}}}, "b": one}
    return Evaluation.model_validate(values | changes)


def test_scores_answers_and_what_must_be_said() -> None:
    text = evaluation_text(evaluation())
    assert text.startswith("# x\\|y: fail\n\nhf, sampled, T = 1, runs 10, 20, at most 48 + 6 tokens (not MiniLLM's")
    assert "| set | rows | ROUGE-L | BLEU |" in text
    assert "| a | 3 | 12.35 [10.00, 15.00] | n/a (no row with a reference) |" in text
    assert "| a | 6 | 50.0 % | 0.0 % | n/a | 1 | 1 | 0.7500 | 12.0 |" in text
    assert text.endswith("\n\n- a: empty\n- &lt;b> said") and "category of" not in text and "average" not in text


def test_several_sets_have_an_average_and_categories_a_table() -> None:
    text = evaluation_text(evaluation(category=True))
    assert "| average |  | 12.3 | n/a |" in text
    assert "| category of a | rows | empty | ROUGE-L | BLEU |" in text and text.count("category of") == 1
    assert "| facts | 3 | 50.0 % | 12.35 [10.00, 15.00] |" in text


def test_greedy_answers_are_called_so() -> None:
    protocol = evaluation().protocol.model_copy(update={"temperature": 0.0, "is_minillm_contract": True})
    text = evaluation_text(evaluation(protocol=protocol))
    assert "greedy, runs 10, 20" in text and "(MiniLLM's contract)" in text
