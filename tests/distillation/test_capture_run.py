"""`moe-edge logits`: several processes write one process's bytes, refusals have their codes, files go out and come back."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from moe_edge.cli import main as cli
from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.distillation.capture import CaptureConfig
from moe_edge.distillation.capture_exchange import export_plain_logits, import_plain_logits
from moe_edge.distillation.capture_run import CaptureRequest, capture, estimate
from moe_edge.distillation.signal import CachedSignal, HeadSignal, TeacherSignal
from moe_edge.formulas.logit_views import WholeLogits
from moe_edge.storage.logit_shards import ShardedLogits
from moe_edge.storage.rows import TokenRows
from tests.distillation.parts import teacher_of
from tests.tiny import tiny_checkpoint

SIZES = ["--tokens", "640", "--sequence-length", "64", "--shard-rows", "2", "--k", "8"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher"), "qwen3_moe")


@pytest.fixture(scope="module")
def cache(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "c"
    summary = capture(request(teacher), out)
    assert summary["rows"] == 10 and summary["shards_written"] == 5
    return out


def request(teacher: Path, data: str = "calibration") -> CaptureRequest:
    return CaptureRequest(teacher_of(teacher), data, 640, CaptureConfig(k=8, shard_rows=2), sequence_length=64)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_two_processes_write_what_one_writes(teacher: Path, cache: Path, tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "moe_edge"]
    command = ["logits", "capture", str(teacher), "--out", str(tmp_path / "c"), "--json", *SIZES]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, *launch, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["shards_written"] == 5  # once, by the leader
    assert "tokens/s" in done.stderr and "a live teacher instead" in done.stderr  # the price, before it is paid
    assert files(tmp_path / "c") == files(cache)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([*SIZES[:-1], "16"], 4, "k: found 8, expected 16"),
        ([*SIZES, "--temperatures", "warm"], 2, "--temperatures"),
        ([*SIZES, "--rs", "50", "--temperatures", "1,2"], 2, "one temperature"),
        ([*SIZES, "--data", "/no/such/text.txt"], 2, "/no/such/text.txt"),
    ],
)
def test_refusals_have_their_codes(
    teacher: Path, cache: Path, options: list[str], code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["moe-edge", "logits", "capture", str(teacher), "--out", str(cache), *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    signal.signal(signal.SIGTERM, handler)
    said = capsys.readouterr()
    assert stop.value.code == code and words in said.err and "Traceback" not in said.err and not said.out


def test_estimate_says_bytes_time_and_memory(teacher: Path, tmp_path: Path) -> None:
    cost = estimate(request(teacher), tmp_path)
    plain = cost.to_dict()
    assert plain["tokens"] == 640 and plain["hours"] > 0 and plain["live_teacher_bytes"] > 100_000
    assert "640 tokens" in cost.text() and not list(tmp_path.iterdir())


def test_a_file_of_text(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("a very short story about experts. " * 300)
    summary = capture(request(teacher, str(tmp_path / "some.txt")), tmp_path / "c")
    assert summary["tokens"] == 640
    assert len(ShardedLogits(tmp_path / "c")) == 10


def test_out_and_back_again(teacher: Path, cache: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.h5"
    assert export_plain_logits(cache, plain)["rows"] == 10
    with h5py.File(plain) as file:
        assert file["values"].shape == file["indices"].shape == (10, 64, 8)
        assert (file["values"].dtype, file["indices"].dtype) == (np.float16, np.int32)
        assert file["input_ids"].shape == (10, 64) and file["values"].chunks == (1, 64, 8)
    assert import_plain_logits(plain, teacher_of(teacher), tmp_path / "back")["tail"] == "exact"
    ours, theirs = CachedSignal(cache, {}), CachedSignal(tmp_path / "back", {})
    ids_S = torch.from_numpy(TokenRows.load(cache / "rows.safetensors").ids_NS[3]).long()
    for temperature in (1.0, 1.5, 2.0):
        one, two = ours.signal(ids_S, temperature), theirs.signal(ids_S, temperature)
        assert isinstance(two, TeacherSignal) and torch.equal(one.indices_SK, two.indices_SK)
        torch.testing.assert_close(one.logprobs_SK, two.logprobs_SK, rtol=0.02, atol=0.03)
        assert torch.equal(one.tail_logmass_S, two.tail_logmass_S)


def test_a_profile_folder_goes_out_too(teacher: Path, tmp_path: Path) -> None:
    from moe_edge.api import build

    sizes = ("calibration.tokens=256", "calibration.sequence_length=64", "profile.cka_tokens=64", "profile.logits.k=8")
    build(teacher, out=tmp_path / "run", settings=sizes, until="profile")
    exported = export_plain_logits(tmp_path / "run" / "profile", tmp_path / "plain.h5")
    assert exported["rows"] == 4 and exported["k"] == 8


def seed_file(cache: Path, path: Path, **changes: np.ndarray) -> Path:
    """What another tool writes: raw logits of the top-k in any order, no tokens, no tail."""
    export_plain_logits(cache, path)
    with h5py.File(path, "r+") as file:
        values, indices = file["values"][...] + np.float16(7), file["indices"][...]
        for name in ("values", "indices", "input_ids", "tail_logmass"):
            del file[name]
        arrays = {"values": values[..., ::-1], "indices": indices[..., ::-1]} | changes
        for name, array in arrays.items():
            file[name] = array
    return path


def test_a_file_without_tokens_and_tail(teacher: Path, cache: Path, tmp_path: Path) -> None:
    path, rows_file = seed_file(cache, tmp_path / "seed.h5"), cache / "rows.safetensors"
    with pytest.raises(ConfigError, match="--rows"):
        import_plain_logits(path, teacher_of(teacher), tmp_path / "c")
    summary = import_plain_logits(path, teacher_of(teacher), tmp_path / "c", rows_file)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert summary["tail"].startswith("missing") and manifest["config"]["tail"].startswith("missing")
    ours, whole = CachedSignal(tmp_path / "c", {}), CachedSignal(cache, {})
    assert "without its tail" in ours.description
    ids_S = torch.from_numpy(TokenRows.load(rows_file).ids_NS[0]).long()
    head, full = ours.signal(ids_S, 2.5), whole.signal(ids_S, 2.0)
    assert isinstance(head, HeadSignal)  # float16 has ties, so that neighbours may have changed places
    assert torch.equal(head.indices_SK.sort(-1).values, full.indices_SK.sort(-1).values)
    p_SK, q_SK = head.pair(WholeLogits(torch.randn(64, ours.vocab)), 2.5)
    torch.testing.assert_close(p_SK, torch.log_softmax(full.logprobs_SK / 2.5, -1), rtol=0.02, atol=0.03)
    torch.testing.assert_close(q_SK.exp().sum(-1), torch.ones(64))


def test_files_that_cannot_be_ours_are_refused(teacher: Path, cache: Path, tmp_path: Path) -> None:
    rows_file, shape = cache / "rows.safetensors", (10, 64, 8)
    cases = {
        "twice": {"indices": np.zeros(shape, np.int32)},
        "ids must lie": {"indices": np.arange(8, dtype=np.int32) + np.full(shape, 10**6, np.int32)},
        "finite": {"values": np.full(shape, np.nan, np.float16)},
        "do not fit together": {"indices": np.zeros((10, 64, 7), np.int32)},
        "expected \\[rows, tokens, k\\]": {"values": np.zeros(shape, np.int32)},
    }
    for number, (words, changes) in enumerate(cases.items()):
        path = seed_file(cache, tmp_path / f"{number}.h5", **changes)
        with pytest.raises(InputRejected, match=words):
            import_plain_logits(path, teacher_of(teacher), tmp_path / str(number), rows_file)
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["values"] = h5py.ExternalLink(str(tmp_path / "0.h5"), "values")
    with pytest.raises(InputRejected, match="plain data set 'values'"):
        import_plain_logits(tmp_path / "link.h5", teacher_of(teacher), tmp_path / "link")
    with pytest.raises(InputRejected, match="not a logit cache"):
        export_plain_logits(tmp_path, tmp_path / "x.h5")


def test_draws_have_no_plain_layout(teacher: Path, tmp_path: Path) -> None:
    config = CaptureConfig(draws=9, temperatures=(1.0,))
    capture(CaptureRequest(teacher_of(teacher), "calibration", 128, config, 64), tmp_path / "c")
    with pytest.raises(InputRejected, match="draws"):
        export_plain_logits(tmp_path / "c", tmp_path / "x.h5")
