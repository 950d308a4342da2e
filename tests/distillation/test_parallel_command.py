"""`accelerate launch -m moe_edge distill` in two processes: the log, metrics and weights of one, and nobody left hanging."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from moe_edge import api
from moe_edge.storage.folders import hash_folder
from moe_edge.storage.tensor_files import load_weights_file
from tests.distillation import parallel_command
from tests.tiny import TEXTS, tiny_checkpoint

FIRST: dict[str, Any] = {"stage_name": "first", "steps": 3, "learning_rate": 0.01, "losses": {"ce": 1.0, "kl": 1.0}}
FROZEN = [{"pattern": "norm|gate", "lr_multiplier": 1.0}, {"pattern": ".*", "lr_multiplier": 0.0}]
SECOND = FIRST | {"stage_name": "second", "parameter_lr_multipliers": FROZEN}
ROUTERS = FIRST | {
    "stage_name": "third",
    "steps": 2,
    "learning_rate": 1e-4,
    "losses": {"router_z": 0.1},
}  # none for the head
SHARDED = {"SHARD": "1", "ACCELERATE_USE_FSDP": "true"}
DEAD = FIRST | {"parameter_lr_multipliers": [{"pattern": "no such name", "lr_multiplier": 0.0}]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a student and a text, and in `alone` what one process makes of them."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 12))
    tiny_checkpoint(folder, "mixtral", name="teacher")
    tiny_checkpoint(folder, "olmoe", name="student", experts=4, hidden=32, seed=3)
    taught = api.distill(
        folder / "teacher", student=folder / "student", out=folder / "alone", settings=settings(folder)
    )
    assert taught.summary.kept == "trained"
    return folder


def settings(folder: Path, *stages: dict[str, Any]) -> list[str]:
    return [
        f"distill.data={folder / 'text.jsonl'}",
        f"distill.stages={json.dumps(stages or [FIRST, SECOND, ROUTERS])}",
        "distill.tokens=800",
        "calibration.sequence_length=32",
        "distill.batch_rows=4",
    ]


def command(teacher: Path, out: Path, wanted: list[str], *options: str) -> list[str]:
    sets = [part for setting in wanted for part in ("--set", setting)]
    return ["distill", str(teacher), "--out", str(out), "--json", *options, *sets]


def launch(
    arguments: list[str], wrapper: bool = False, processes: int = 2, **environment: str
) -> subprocess.CompletedProcess[str]:
    program = [parallel_command.__file__] if wrapper else ["-m", "moe_edge"]
    options = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0", "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # said, so that accelerate does not warn
    whole = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    line = [sys.executable, "-m", "accelerate.commands.launch", *options, *program, *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=whole, timeout=600)


def with_student(folder: Path, out: str, *stages: dict[str, Any], **environment: str) -> Any:
    wanted = settings(folder, *stages)
    line = command(folder / "teacher", folder / out, wanted, "--student", str(folder / "student"))
    return launch(line, wrapper=bool(environment), **environment)


def assert_alike(one: Path, other: Path) -> None:
    """The same steps, losses and measures, and the same weights, to the round-off of sums."""
    logs = [[json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()] for out in (one, other)]
    assert len(logs[0]) == len(logs[1])
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert theirs[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-6)), name
    metrics = [json.loads((out / "metrics.json").read_text()) for out in (one, other)]
    for end in ("before", "after"):
        assert metrics[1][end]["kl_nats"] == pytest.approx(metrics[0][end]["kl_nats"], rel=1e-5)
    for name in ("kept", "tokens_trained", "held_out_tokens"):
        assert metrics[0][name] == metrics[1][name]
    weights = [load_weights_file(out / "model" / "model.safetensors") for out in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "sharded"), [("0", SHARDED), ("1", {})], ids=["leader-sharded", "helper-copied"])
def test_a_killed_process_ends_all_and_the_same_command_resumes(made: Path, rank: str, sharded: dict[str, str]) -> None:
    """And two processes teach a student as one does that was never killed; what is printed, the leader prints once."""
    out = f"killed-{rank}"
    killed = with_student(made, out, DIE_AT="2", DIE_RANK=rank, SAVE_ALWAYS="1", **sharded)
    assert killed.returncode != 0 and "Signal 9 (SIGKILL)" in killed.stderr
    assert [path.name for path in (made / out / "distill/checkpoints/0-first").iterdir()] == ["checkpoint-2"]
    resumed = with_student(made, out, SAVE_ALWAYS="1", **sharded)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert resumed.stderr.count("resuming 'first' behind step 2 of 3") == 1
    assert json.loads(resumed.stdout)["out"] == str(made / out) and resumed.stderr.count("step 3/3") == 2
    assert_alike(made / "alone" / "distill", made / out / "distill")
    names = [set(hash_folder(made / folder / "distill")) for folder in ("alone", out)]
    assert names[0] == names[1] and [path.name for path in (made / out / "distill").glob(".*")] == [".placement.json"]


@pytest.mark.slow
def test_a_refusal_ends_all_processes_with_its_code(made: Path) -> None:
    done = with_student(made, "refused", DEAD)
    assert done.returncode != 0 and "has no effect" in done.stderr
    assert "exitcode  : 2" in done.stderr and "internal error" not in done.stderr
    assert not done.stdout and not (made / "refused/distill/manifest.json").exists()


@pytest.mark.slow
def test_what_only_the_leader_finds_ends_the_others_too(made: Path) -> None:
    (made / "held").mkdir()
    with FileLock(made / "held" / ".lock"):
        done = with_student(made, "held")
    assert done.returncode != 0 and done.stderr.count("in use by another build") == 1
    assert "exitcode  : 5" in done.stderr and "SIGKILL" not in done.stderr and "internal error" not in done.stderr


@pytest.mark.slow
def test_a_build_up_to_distill_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe")
    wanted = [
        "calibration.tokens=1280",
        "calibration.sequence_length=64",
        "profile.cka_tokens=256",
        "profile.logits.k=8",
        "plan.experts=4",
        "distill.batch_rows=4",
        f"distill.stages={json.dumps([FIRST])}",
    ]
    api.build(teacher, until="distill", out=tmp_path / "a", settings=wanted)
    done = launch(command(teacher, tmp_path / "b", wanted, "--fresh"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["stages"] == dict.fromkeys(("profile", "plan", "compress", "distill"), False)
    for stage in ("profile", "plan", "compress", "distill"):
        assert done.stderr.count(f"{stage}: running") == 1
    assert_alike(tmp_path / "a" / "distill", tmp_path / "b" / "distill")
