"""Units: what users write becomes bytes, seconds and shares, and nonsense is refused."""

import pytest

from moe_edge.contracts.units import format_bytes, parse_bytes, parse_seconds, parse_share


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 4 << 30), ("1.5 MiB", 3 << 19), ("2GB", 2 * 10**9), (77, 77), ("12", 12)]
)
def test_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["4 parsecs", "", "-1", -1, True, None, "GiB", 1.5])
def test_bad_bytes(text):
    with pytest.raises(ValueError):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "seconds"), [("2s", 2.0), ("250ms", 0.25), ("3min", 180.0), (4, 4.0)])
def test_seconds(text, seconds):
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "share"), [("62.5%", 0.625), (0.5, 0.5), ("1.0", 1.0), (1, 1.0)])
def test_share(text, share):
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0%", "120%", 0, 2, "many", None, True])
def test_bad_share(text):
    with pytest.raises(ValueError):
        parse_share(text)


def test_format_bytes():
    assert [format_bytes(size) for size in (12, 1536, 5 << 20, 3 << 31)] == ["12 B", "1.5 KiB", "5.0 MiB", "6.0 GiB"]
