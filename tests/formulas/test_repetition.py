"""Repeated ends of a text, against a loop over all periods and lengths."""

import numpy as np
import pytest

from moe_edge.formulas.repetition import repeated_suffix


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
