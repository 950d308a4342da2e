"""Speeds from timestamps that are known to the nanosecond."""

import pytest
from pydantic import ValidationError

from moe_edge.metrics.speed import MIN_INTERVALS_FOR_P95, TimedRun, summarise

MS = 10**6


def _run(prefill_ms: int, step_ms: list[int], sample_ms: int = 1) -> TimedRun:
    first = (prefill_ms + sample_ms) * MS
    times = [first]
    for step in step_ms:
        times.append(times[-1] + step * MS)
    return TimedRun(issued_ns=0, prefilled_ns=prefill_ms * MS, token_ns=times)


def test_medians_follow_the_definitions() -> None:
    runs = [_run(prefill, [step] * 10) for prefill, step in ((100, 10), (50, 20), (200, 40))]
    speed = summarise(runs, prompt_tokens=50)
    assert speed.ttft_ms_p50 == 101
    assert speed.prefill_tokens_per_s == 500
    assert speed.decode_tokens_per_s == pytest.approx(50)
    assert speed.n_runs == 3
    assert speed.cov == pytest.approx(0.65465, rel=1e-4)  # of 100, 50, 25


def test_p95_needs_enough_intervals() -> None:
    few = summarise([_run(10, [5] * 63)] * 3, prompt_tokens=8)
    assert few.decode_p95_ms is None
    assert "200 intervals, there are 189" in few.reason
    slow_tail = [_run(10, [5] * 56 + [50] * 7)] * 4
    enough = summarise(slow_tail, prompt_tokens=8)
    assert enough.n_intervals == 252 >= MIN_INTERVALS_FOR_P95
    assert enough.decode_p95_ms == pytest.approx(50)
    assert enough.reason is None


def test_one_run_has_no_spread_and_says_so() -> None:
    speed = summarise([_run(10, [5] * 250)], prompt_tokens=8)
    assert speed.cov is None
    assert "two runs" in speed.reason


def test_nothing_measured_is_null_with_a_reason() -> None:
    speed = summarise([], prompt_tokens=8)
    assert speed.decode_tokens_per_s is None
    assert speed.reason == "no run was measured"
    single = summarise([_run(10, [])], prompt_tokens=8)
    assert single.decode_tokens_per_s is None
    assert "two tokens" in single.reason
    assert single.ttft_ms_p50 == 11


@pytest.mark.parametrize(
    "times",
    [
        {"prefilled_ns": 5, "token_ns": [9, 8]},
        {"prefilled_ns": 0, "token_ns": [1]},
        {"prefilled_ns": 5, "token_ns": []},
    ],
)
def test_impossible_timestamps_are_refused(times: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TimedRun.model_validate({"issued_ns": 0, **times})
