"""The harness with real processes on a fake runtime: samples come back, every way to die has its name."""

import json
import signal
import sys
from pathlib import Path

import pytest

from moe_edge.devices import harness
from moe_edge.devices.harness import BenchJob, Failure, Samples, classify, measure
from moe_edge.devices.transport import Completed, LocalTransport

ROOT = Path(__file__).parents[2]
WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes find the package also where it is not installed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def _job(path: str = "model.gguf", **changes: object) -> BenchJob:
    fields = {"threads": 1, "prompt_tokens": 5, "new_tokens": 4, "repetitions": 3} | changes
    return BenchJob("llama_cpp", path, **fields)


def _measure(path: str, timeout_s: float = 60) -> Samples | Failure:
    return measure(LocalTransport(), _job(path), worker=WORKER, timeout_s=timeout_s)


def test_raw_samples_come_back_in_spite_of_chatter_on_stdout() -> None:
    samples = measure(LocalTransport(), _job(prompt_ids=[1, 2, 3, 4, 5]), worker=WORKER)
    assert isinstance(samples, Samples)
    assert len(samples.runs) == 3
    assert all(len(run.token_ns) == 4 for run in samples.runs)
    assert samples.peak_rss_bytes >= samples.baseline_rss_bytes > 0
    speed, memory = harness.to_speed(samples, prompt_tokens=5), harness.to_memory(samples)
    assert 0 < speed.decode_tokens_per_s < 2000  # a fake step sleeps half a millisecond
    assert speed.ttft_ms_p50 > 2
    assert memory.peak_rss_mib > 1


def test_runs_of_one_process_do_not_overlap_and_are_in_order_and_the_runtimes_state_comes_along() -> None:
    samples = _measure("amx.gguf")
    assert isinstance(samples, Samples) and samples.repacks is False, "what the runtime says of itself comes along"
    ends = [run.token_ns[-1] for run in samples.runs]
    assert all(end < later.issued_ns for end, later in zip(ends, samples.runs[1:], strict=False))


@pytest.mark.parametrize(
    ("path", "kind", "text"),
    [
        ("reject", "rejected", "no model"),
        ("memory", "oom", "9 GiB"),
        ("large", "oom", "not measured: the model does not fit into memory"),
        ("killed", "oom", "memory ran out"),
        ("illegal", "crash", "SIGILL"),
        ("raise", "crash", "ZeroDivisionError"),
    ],
)
def test_every_death_is_a_named_failure(path: str, kind: str, text: str) -> None:
    failure = _measure(path)
    assert isinstance(failure, Failure)
    assert failure.kind == kind
    assert text in failure.detail
    speed = harness.to_speed(failure, prompt_tokens=5)
    assert (speed.decode_tokens_per_s, speed.n_runs) == (None, 0)
    assert speed.reason.startswith(f"failed:{kind}")
    assert harness.to_memory(failure).peak_rss_mib is None


def test_a_hanging_worker_is_killed_and_named() -> None:
    failure = _measure("hang", timeout_s=1.5)
    assert (failure.kind, failure.detail) == ("timeout", "killed after 2 s")


class ReplayTransport:
    """Answers every command with the same bytes."""

    address = "fake"

    def __init__(self, stdout: bytes) -> None:
        self.stdout = stdout

    def run(self, argv: object, stdin: bytes, timeout_s: float) -> Completed:
        return Completed(0, self.stdout, "")


def _valid(**changes: object) -> dict[str, object]:
    run = {"issued_ns": 0, "prefilled_ns": 5, "token_ns": [6, 7, 8, 9]}
    return {
        "schema": "moe-edge/samples@1",
        "runs": [run] * 3,
        "load_ns": 1,
        "baseline_rss_bytes": 1,
        "peak_rss_bytes": 2,
        "peak_uss_bytes": None,
    } | changes


@pytest.mark.parametrize(
    "stdout",
    [
        b"",
        b"not json",
        json.dumps(_valid(runs=[])).encode(),
        json.dumps(_valid(extra=1)).encode(),
        json.dumps(_valid(runs=[{"issued_ns": 0, "prefilled_ns": 5, "token_ns": [9, 6]}] * 3)).encode(),
        json.dumps(_valid(runs=[{"issued_ns": 0, "prefilled_ns": 5, "token_ns": [6, 7]}] * 3)).encode(),
        json.dumps(_valid(peak_rss_bytes=0)).encode(),
    ],
)
def test_what_a_device_says_is_checked(stdout: bytes) -> None:
    failure = measure(ReplayTransport(stdout), _job())
    assert isinstance(failure, Failure)
    assert failure.kind == "bad_output"


def test_oversized_output_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = json.dumps(_valid()).encode()
    assert isinstance(measure(ReplayTransport(stdout), _job()), Samples)
    monkeypatch.setattr(harness, "MAX_SAMPLES_BYTES", 100)
    assert measure(ReplayTransport(stdout), _job()).kind == "bad_output"


@pytest.mark.parametrize(
    ("completed", "kind"),
    [
        (Completed(137, b"", ""), "oom"),
        (Completed(1, b"", "ggml: failed to allocate buffer\n"), "oom"),
        (Completed(124, b"", ""), "timeout"),
        (Completed(-signal.SIGSEGV, b"", ""), "crash"),
        (Completed(1, b"", ""), "crash"),
    ],
)
def test_return_codes_of_devices(completed: Completed, kind: str) -> None:
    assert classify(completed, 10).kind == kind


def test_samples_are_kept_as_they_came(tmp_path: Path) -> None:
    samples = Samples.model_validate(_valid())
    harness.save_samples(samples, tmp_path / "raw" / "x.json")
    assert Samples.model_validate_json((tmp_path / "raw" / "x.json").read_bytes()) == samples
