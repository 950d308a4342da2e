"""Pieces of Markdown: readable numbers, inert text, and nothing where there is nothing to say."""

import pytest

from moe_edge.reporting.markdown import bullets, facts, inert, interval, number, paragraphs, percent, section, table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (0.0, "0.0000"),
        (0.05123, "0.0512"),
        (12.345, "12.3"),
        (1234.5, "1234"),
        (1e-6, "1.00e-06"),
        (-0.5, "-0.5000"),
    ],
)
def test_numbers_are_readable(value: float | None, text: str) -> None:
    assert number(value) == text


def test_intervals_are_two_numbers_or_nothing() -> None:
    assert interval((0.04, 12.0)) == "[0.0400, 12.0]" and interval(None) == "n/a"


def test_shares_and_facts_say_what_is_unknown() -> None:
    assert percent(0.125) == "12.5 %" and percent(None) == "n/a"
    assert facts({"cpu": "a|b", "governor": None, "cores": 2}) == "cpu a\\|b; cores 2" and facts({}) == ""


def test_names_stay_inert() -> None:
    assert inert("a|b\nc") == "a\\|b c" and inert("<b> & co") == "&lt;b> &amp; co"
    assert table(("a", "b"), [("x|y", 1)]) == "| a | b |\n|---|---:|\n| x\\|y | 1 |"
    assert bullets(["one\n# two", 3], "so: ") == "- so: one # two\n- so: 3"


def test_nothing_to_say_leaves_no_trace() -> None:
    assert table(("a", "b"), []) == bullets([]) == section("Heading", "", "") == paragraphs() == ""
    assert section("Heading", "", "one", "two") == "## Heading\n\none\n\ntwo"


def test_no_name_steers_a_terminal() -> None:
    assert inert("a\x1b[31mb\x07\x9bc\u202ed\udc80") == "a?[31mb??c?d?"
