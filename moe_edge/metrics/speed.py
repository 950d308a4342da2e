"""Raw timestamps to named speeds: time to first token, prefill and decode rates, inter-token p95, spread.

The harness returns timestamps only; every average is taken here, by the definitions below, which the report prints.
"""

import statistics

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe_edge.contracts.measurements import Speed

MIN_INTERVALS_FOR_P95 = 200

DEFINITIONS = {
    "ttft_ms_p50": "token ids handed to the runtime -> first token known (prefill and greedy choice; "
    "tokenization excluded); median over runs, model loaded and warm",
    "prefill_tokens_per_s": "prompt tokens / time of the prefill call; median over runs",
    "decode_tokens_per_s": "(n - 1) / (t_last - t_first) over the n tokens of a run, greedy choice included; "
    "median over runs (the shape of llama-bench's tg, at the depth of the prompt)",
    "decode_p95_ms": "95th percentile of the intervals between tokens over all runs; "
    f"needs {MIN_INTERVALS_FOR_P95} of them",
    "cov": "standard deviation / mean of the runs' decode tokens per second",
}


class TimedRun(BaseModel):
    """One measured run: monotonic timestamps in nanoseconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    issued_ns: int = Field(description="the prompt's ids are handed over")
    prefilled_ns: int = Field(description="the logits of the last prompt position are there")
    token_ns: list[int] = Field(
        min_length=1, description="each token is known (greedy argmax); the first ends the TTFT"
    )

    @model_validator(mode="after")
    def _time_runs_forward(self) -> "TimedRun":
        times = [self.issued_ns, self.prefilled_ns, *self.token_ns]
        if sorted(times) != times or self.prefilled_ns == self.issued_ns:
            raise ValueError("timestamps must increase")
        return self


def summarise(runs: list[TimedRun], prompt_tokens: int) -> Speed:
    """Medians and spread of repeated runs.

    Args:
        runs: measured runs, the warm-up left out.
        prompt_tokens: tokens of the prompt of every run.

    Returns:
        Speed whose unmeasurable numbers are null, with the reason.
    """
    if not runs:
        return Speed(reason="no run was measured")
    rates = [rate for rate in map(_decode_tokens_per_s, runs) if rate is not None]
    intervals_ms = np.concatenate([np.diff(run.token_ns) for run in runs]) / 1e6
    reasons = _reasons(len(rates), len(intervals_ms))
    return Speed(
        ttft_ms_p50=statistics.median((run.token_ns[0] - run.issued_ns) / 1e6 for run in runs),
        prefill_tokens_per_s=statistics.median(
            prompt_tokens / (run.prefilled_ns - run.issued_ns) * 1e9 for run in runs
        ),
        decode_tokens_per_s=statistics.median(rates) if rates else None,
        decode_p95_ms=float(np.percentile(intervals_ms, 95)) if len(intervals_ms) >= MIN_INTERVALS_FOR_P95 else None,
        n_runs=len(runs),
        cov=statistics.stdev(rates) / statistics.mean(rates) if len(rates) > 1 else None,
        n_intervals=len(intervals_ms),
        reason="; ".join(reasons) or None,
    )


def _decode_tokens_per_s(run: TimedRun) -> float | None:
    elapsed_ns = run.token_ns[-1] - run.token_ns[0]
    return (len(run.token_ns) - 1) / elapsed_ns * 1e9 if elapsed_ns else None


def _reasons(n_rates: int, n_intervals: int) -> list[str]:
    reasons = []
    if not n_rates:
        reasons.append("decode speed needs at least two tokens in a run")
    if n_intervals < MIN_INTERVALS_FOR_P95:
        reasons.append(f"p95 needs {MIN_INTERVALS_FOR_P95} intervals, there are {n_intervals}")
    if n_rates < 2:
        reasons.append("the spread needs at least two runs")
    return reasons
