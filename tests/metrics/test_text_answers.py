"""Statuses: every way an answer can go wrong has a name; repeated ends are found as by a loop over all periods."""

import json

import numpy as np
import pytest

from moe_edge.metrics.text_answers import (
    Answer,
    Status,
    distinct_ngrams,
    failed,
    judge_answer,
    looping_tail,
    repeated_suffix,
)

PROSE = list(range(100, 140))


@pytest.mark.parametrize(
    ("tokens", "text", "status", "finish", "kept"),
    [
        ([], "", Status.EMPTY, "stop", ""),
        ([5, 6], " \n\x00", Status.EMPTY, "stop", ""),
        (PROSE[:10], "fine", Status.OK, "stop", "fine"),
        (PROSE, "long", Status.TRUNCATED, "length", "long"),
        (PROSE, "cut in a character \ufffd", Status.TRUNCATED, "length", "cut in a character"),
        (PROSE, "\ufffd", Status.EMPTY, "length", ""),
        (PROSE[:3], "a\ufffdb", Status.DECODE_ERROR, "stop", "ab"),
        (PROSE[:3], "end \ufffd", Status.DECODE_ERROR, "stop", "end"),
        (PROSE[:3], None, Status.DECODE_ERROR, "stop", ""),
        (PROSE[:8] + [1, 2] * 16, "round", Status.REPEATED, "length", "round"),
        (PROSE[:8] + [1, 2] * 8, "round", Status.REPEATED, "stop", "round"),
        ([1, 2, 3, 4, 5] * 4 + [9, 8, 7], "circled", Status.REPEATED, "stop", "circled"),
        ([1, 2] * 4, "ha ha", Status.OK, "stop", "ha ha"),
    ],
)
def test_statuses(tokens: list[int], text: str | None, status: Status, finish: str, kept: str) -> None:
    answer = judge_answer(tokens, text, max_new_tokens=40)
    assert (answer.status, answer.finish, answer.text, answer.n_tokens) == (status, finish, kept, len(tokens))
    assert Answer.from_dict(json.loads(json.dumps(answer.to_dict()))) == answer


def test_a_failed_row_keeps_its_reason() -> None:
    answer = failed(RuntimeError("no memory\nmore lines"))
    assert (answer.status, answer.text, answer.error) == (Status.EXCEPTION, "", "RuntimeError: no memory")
    assert failed(ValueError()).error == "ValueError: "
    with pytest.raises((TypeError, ValueError)):
        Answer.from_dict({"status": "splendid", "text": ""})


@pytest.mark.parametrize(
    ("tokens", "tail"),
    [
        ([], (0, 0)),
        ([1], (0, 0)),
        ([1, 2, 3, 4], (0, 0)),
        ([1, 1], (2, 2)),
        ([7, 7, 7, 7], (4, 4)),
        ([9, 1, 2, 1, 2], (4, 2)),
        ([2, 1, 2, 1, 2], (5, 2)),
        ([1, 2, 3, 1, 2, 3, 4], (0, 0)),
        ([5, 1, 1, 2, 1, 1, 2], (6, 2)),
        ([3, 3, 8, 8], (2, 2)),
    ],
)
def test_looping_tail(tokens: list[int], tail: tuple[int, int]) -> None:
    assert looping_tail(tokens) == tail


def test_looping_tail_against_a_slow_search() -> None:
    generator = np.random.default_rng(0)
    for _ in range(2000):
        tokens = generator.integers(0, 3, generator.integers(0, 14)).tolist()
        best, repeats = 0, 0
        for period in range(1, len(tokens) // 2 + 1):
            same = 0
            while same + period < len(tokens) and tokens[-1 - same] == tokens[-1 - same - period]:
                same += 1
            if same >= period and same + period > best:
                best, repeats = same + period, (same + period) // period
        assert looping_tail(tokens) == (best, repeats), tokens


def test_distinct_ngrams() -> None:
    assert distinct_ngrams([1, 2, 3]) is None
    assert distinct_ngrams([1, 2, 3, 4]) == 1.0
    assert distinct_ngrams([1] * 7) == 0.25
    assert distinct_ngrams([1, 2, 1, 2, 1], n=2) == 0.5


def slow(ids: list[int]) -> int:
    best = 0
    for period in range(1, len(ids) // 2 + 1):
        length = 0
        while length + period < len(ids) and ids[-1 - length] == ids[-1 - length - period]:
            length += 1
        best = max(best, length if length >= period else 0)
    return best


def test_equals_the_slow_loop() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        ids = generator.integers(0, 3, generator.integers(0, 24)).tolist()
        assert repeated_suffix(ids).length == slow(ids)


@pytest.mark.parametrize(
    ("text", "kept"),
    (
        ("abcbcbc", "abc"),
        ("aaaa", "a"),
        ("abcd", "abcd"),
        ("", ""),
        ("a", "a"),
        ("xyabcabcab", "xyabc"),
        ("abab c", "abab c"),
    ),
)
def test_cutting_leaves_the_first_copy(text: str, kept: str) -> None:
    suffix = repeated_suffix([ord(letter) for letter in text])
    assert text[: len(text) - suffix.length] == kept
    assert suffix.share(len(text)) == pytest.approx((len(text) - len(kept)) / max(1, len(text)))


def test_the_shortest_period_is_named() -> None:
    assert repeated_suffix([1, 2, 1, 2, 1, 2]) == (4, 2)
