"""Two processes share a profile: the same command, started by accelerate, writes what one process writes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_edge.api import build
from moe_edge.contracts.errors import ConfigError, EnvironmentProblem
from moe_edge.contracts.manifest import read_manifest
from moe_edge.pipeline import Build, run_stages
from moe_edge.process.placement import DECIDED
from moe_edge.process.ranks import Ranks, current_ranks, lost_processes_named
from moe_edge.storage.statistics import TENSOR_FIELDS, Statistics
from tests.tiny import tiny_checkpoint

SETTINGS = ("calibration.tokens=1280", "calibration.sequence_length=64", "profile.cka_tokens=256", "profile.logits.k=8")


def test_two_processes_write_what_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, alone, together = tiny_checkpoint(tmp_path, "qwen3_moe"), tmp_path / "alone", tmp_path / "together"
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    build(teacher, out=alone, settings=SETTINGS, until="profile")
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    launch = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # said, so that accelerate does not warn
    command = ["-m", "moe_edge", "profile", str(teacher), "--out", str(together), "--fresh", "--json", *settings]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    printed = {"out": str(together), "stages": {"profile": False}}
    assert json.loads(done.stdout) == printed  # once, by the leader
    one, other = (Statistics.load(out / "profile" / "statistics.safetensors") for out in (alone, together))
    for name in TENSOR_FIELDS:
        first, second = getattr(one, name), getattr(other, name)
        if first.dtype == torch.int64:
            assert torch.equal(first, second), name
        else:
            torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-6 * float(first.abs().max()), msg=name)
    assert (one.tokens, one.cka_tokens, one.meta) == (other.tokens, other.cka_tokens, other.meta)
    for name, sums in one.imatrix.items():
        np.testing.assert_allclose(other.imatrix[name], sums, rtol=1e-6)
    logits = [(out / "profile" / "logits.h5").read_bytes() for out in (alone, together)]
    assert logits[0] == logits[1]
    manifests = [read_manifest(out / "profile") for out in (alone, together)]
    assert manifests[0] and manifests[1] and manifests[0].key == manifests[1].key
    assert manifests[0].files.keys() == manifests[1].files.keys()
    assert sorted(path.name for path in (together / "profile").iterdir()) == sorted(
        [DECIDED, *manifests[1].files, "manifest.json"]
    )


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Ranks(3, 4, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Ranks(1, 2, 1, 2)),
        ({"RANK": "", "WORLD_SIZE": "2"}, Ranks()),
    ],
)
def test_ranks_come_from_the_launcher(
    environment: dict[str, str], expected: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert current_ranks() == expected
    assert Ranks().share("x") == "x"


def test_other_stages_run_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    state = Build(None, None, tmp_path / "out")  # type: ignore[arg-type]
    for until in ("plan", "validate", None):
        with pytest.raises(ConfigError, match="(?s)profile and distill, but not.*then the build in one process"):
            run_stages(state, until=until)


def test_a_helper_takes_the_leaders_word_and_its_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []

    class Group:
        def broadcast_object_list(self, held: list[object], src: int) -> None:
            sent.append(held[0]) if held[0] is not None else held.__setitem__(0, sent.pop())

    monkeypatch.setattr(Ranks, "_group", lambda _: Group())
    leader, helper, ran = Ranks(0, 2), Ranks(1, 2), []
    assert leader.lead(lambda: ran.append(1) or "x") == "x"
    assert helper.lead(lambda: ran.append(2) or "y") == "x" and ran == [1]
    with pytest.raises(ConfigError, match="no such"):
        leader.lead(lambda: (_ for _ in ()).throw(ConfigError("no such thing")))
    with pytest.raises(SystemExit) as stop:
        helper.lead(lambda: None)
    assert stop.value.code == ConfigError.exit_code


def test_a_lost_process_is_named_and_other_errors_stay() -> None:
    with pytest.raises(EnvironmentProblem, match="another process of this launch has ended"), lost_processes_named():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RuntimeError, match="shapes"), lost_processes_named():
        raise RuntimeError("shapes cannot be multiplied")
