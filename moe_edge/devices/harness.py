"""The benchmark harness: one fresh worker process per artifact, raw samples back, failures named and never zero.

Artifacts run one after another in the order given; each process does a full-shape warm-up and then its repetitions.
What comes back from a device is untrusted: its size is capped and its schema is checked.
"""

import json
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_edge.contracts.errors import DeviceProblem, InputRejected, MoeEdgeError, ResourceProblem, says_exhausted
from moe_edge.contracts.measurements import Memory, Speed
from moe_edge.devices.transport import Completed, Transport
from moe_edge.devices.worker import REJECTED, TOO_LARGE
from moe_edge.metrics.memory import MIB
from moe_edge.metrics.speed import TimedRun, summarise

log = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "moe_edge.devices.worker")
TIMEOUT_S = 1800.0
MAX_SAMPLES_BYTES = 16 * MIB


@dataclass(frozen=True)
class BenchJob:
    """One artifact, one shape. `prompt_ids` None: the worker draws seeded random ids. `options`: for the runtime."""

    runtime: str
    path: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    prompt_ids: list[int] | None = None
    options: dict[str, str] = field(default_factory=dict)


class Samples(BaseModel):
    """What a worker returns."""

    model_config = ConfigDict(extra="forbid")
    schema_: Literal["moe-edge/samples@1"] = Field(alias="schema")
    runs: list[TimedRun] = Field(min_length=1)
    load_ns: int = Field(ge=0)
    baseline_rss_bytes: int = Field(gt=0)
    peak_rss_bytes: int = Field(gt=0)
    peak_uss_bytes: int | None
    repacks: bool | None = None  # does llama.cpp compute with weights that it rearranged? null: another runtime


FailureKind = Literal["oom", "timeout", "crash", "rejected", "bad_output"]
# What a failure of a single artifact means to the user who asked for just that one.
FAILURE_ERRORS: dict[str, type[MoeEdgeError]] = {
    "oom": ResourceProblem,
    "rejected": InputRejected,
    "timeout": DeviceProblem,
    "crash": DeviceProblem,
    "bad_output": DeviceProblem,
}


@dataclass(frozen=True)
class Failure:
    """A cell that gave no numbers."""

    kind: FailureKind
    detail: str

    def __str__(self) -> str:
        return f"failed:{self.kind}: {self.detail}"


def measure(
    transport: Transport, job: BenchJob, *, worker: Sequence[str] = WORKER, timeout_s: float = TIMEOUT_S
) -> Samples | Failure:
    """Run one job in a fresh process on the device.

    Args:
        transport: reaches the device.
        job: what to run.
        worker: the command that reads a job on stdin and writes samples on stdout.
        timeout_s: after this the process group is killed.
    """
    log.info("measuring %s with %s", job.path, job.runtime)
    completed = transport.run(worker, json.dumps(asdict(job)).encode(), timeout_s)
    failure = classify(completed, timeout_s)
    if failure:
        return failure
    if len(completed.stdout) > MAX_SAMPLES_BYTES:
        return Failure("bad_output", f"{len(completed.stdout)} bytes of samples, at most {MAX_SAMPLES_BYTES}")
    try:
        samples = Samples.model_validate_json(completed.stdout)
    except ValidationError as error:
        return Failure("bad_output", f"samples do not match their schema: {error.errors()[0]['msg']}")
    if len(samples.runs) != job.repetitions or any(len(run.token_ns) != job.new_tokens for run in samples.runs):
        return Failure("bad_output", "the worker returned another number of runs or tokens than asked for")
    return samples


def classify(completed: Completed, timeout_s: float) -> Failure | None:
    """What a return code and a last message mean; None when the command succeeded."""
    last = _last_line(completed.stderr_tail)
    if completed.timed_out or completed.returncode == 124:
        return Failure("timeout", f"killed after {timeout_s:.0f} s")
    if completed.returncode == 0:
        return None
    if completed.returncode == REJECTED:
        return Failure("rejected", completed.stderr_tail.strip())
    if completed.returncode == TOO_LARGE:
        return Failure("oom", completed.stderr_tail.strip())
    if completed.returncode in (-signal.SIGKILL, 137):
        return Failure("oom", "the process was killed, most likely because memory ran out")
    if says_exhausted(completed.stderr_tail):
        return Failure("oom", last)
    if completed.returncode < 0:
        return Failure("crash", f"{signal.Signals(-completed.returncode).name}: {last}")
    return Failure("crash", f"exit status {completed.returncode}: {last}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def save_samples(samples: Samples, path: Path) -> None:
    """Keep the raw samples beside the results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(samples.model_dump_json(by_alias=True) + "\n")


def to_speed(outcome: Samples | Failure, prompt_tokens: int) -> Speed:
    """Named speeds, or nulls with the failure as the reason."""
    return Speed(reason=str(outcome)) if isinstance(outcome, Failure) else summarise(outcome.runs, prompt_tokens)


def to_memory(outcome: Samples | Failure) -> Memory:
    """Peak memory of the worker, or null with the failure as the reason."""
    if isinstance(outcome, Failure):
        return Memory(reason=str(outcome))
    return Memory(
        peak_rss_mib=outcome.peak_rss_bytes / MIB,
        baseline_rss_mib=outcome.baseline_rss_bytes / MIB,
        peak_uss_mib=outcome.peak_uss_bytes / MIB if outcome.peak_uss_bytes is not None else None,
        reason=None if outcome.peak_uss_bytes is not None else "this system does not report unique pages",
    )
