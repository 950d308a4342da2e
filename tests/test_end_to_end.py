"""The main job on a tiny random teacher: every stage for real, both formats, resumable to the same bytes.

A random teacher has no knowledge to keep, so these builds need not pass quality gates; they must finish, be complete, honest and
reproducible. What a good teacher gives is measured by the demo build (README) and tests/benchmarks.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe_edge.contracts.manifest import read_manifest
from moe_edge.contracts.plan import Plan
from moe_edge.distillation.checkpoints import latest_checkpoint, step_of
from moe_edge.models.loading import load_model
from moe_edge.pipeline import STAGE_NAMES
from tests.tiny import tiny_checkpoint

SETTINGS = [
    "calibration.tokens=1024", "calibration.sequence_length=64", "profile.cka_tokens=256", "plan.tokens=256",
    "distill.tokens=512", "validate.tokens=256", "validate.prompt_tokens=16",
    "validate.new_tokens=8", "validate.repetitions=2", "plan.experts=4",
    "target.context_length=128", "target.runtime.threads=1",
]  # fmt: skip


def command(teacher: Path, out: Path, *more: str) -> list[str]:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return [
        sys.executable,
        "-m",
        "moe_edge",
        "build",
        str(teacher),
        "--target",
        "cpu",
        "--out",
        str(out),
        *settings,
        *more,
    ]


def build(teacher, out, *more, cache, timeout=400):
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "MOE_EDGE_CACHE": str(cache)}
    return subprocess.run(
        command(teacher, out, *more), capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )


@pytest.fixture
def rebuild(called, monkeypatch, caplog):
    """`build` in this process, where no other is needed: exit code and what was logged."""

    def run(teacher, out, *more, cache):
        monkeypatch.setenv("MOE_EDGE_CACHE", str(cache))
        caplog.clear()
        with caplog.at_level(logging.INFO):
            code, _, _ = called(*command(teacher, out, *more)[3:])
        return code, caplog.text

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One complete build of a tiny qwen3_moe."""
    top = tmp_path_factory.mktemp("build")
    teacher = tiny_checkpoint(top, "qwen3_moe", tied=True)
    done = build(teacher, top / "run", cache=top / "cache")
    assert done.returncode in (0, 10), done.stderr[-4000:]
    return top, teacher, done


def artifact_digests(run: Path) -> dict[str, str]:
    files = json.loads((run / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.startswith("artifacts/")}


def test_every_stage_left_a_manifest_and_the_report_is_complete(finished):
    top, _, done = finished
    report = json.loads((top / "run/report.json").read_text())
    assert report["schema"] == "moe-edge/report@1"
    assert [row["name"] for row in report["stages"]] == list(STAGE_NAMES)
    assert report["student"]["experts"] == 4 and report["teacher"]["experts"] == 6
    assert {row["format"] for row in report["artifacts"]} >= {"gguf", "onnx"}
    for row in report["artifacts"]:
        assert row["bytes"] > 0 and row["quality"]["kl_nats"] > 0 and row["speed"]["decode_tokens_per_s"] > 0
    assert (report["verdict"] == "pass") == (done.returncode == 0)
    assert report["gates"] and (top / "run/report.md").read_text() in done.stdout


def test_the_plan_is_readable_and_random_stands_beside(finished):
    top, _, _ = finished
    plan = Plan.read(top / "run/plan/plan.json")
    assert plan.experts_kept == 4 and plan.prunes
    names = {row.criterion for row in plan.candidates}
    assert {"frequency", "ean", "msan", "reap", "cka-diverse", "random"} <= names
    assert plan.predicted_kl_nats == min(row.kl_nats for row in plan.candidates)


def test_full_precision_parity_was_required(finished):
    top, _, _ = finished
    rows = {row["artifact"]: row for row in json.loads((top / "run/export/parity.json").read_text())}
    assert rows["gguf F16"]["passed"] is True and rows["onnx fp32"]["passed"] is True
    assert rows["onnx fp32"]["clear_max_abs_logit"] <= 1e-4 and rows["gguf F16"]["clear_tokens"] > 0
    assert rows["gguf F16 against onnx fp32"]["passed"] is True
    (pair,) = (row for name, row in rows.items() if " delivered against onnx int4 delivered" in name)
    assert 0 < pair["kl_nats"] <= pair["limit_kl_nats"]
    files = [row for row in rows.values() if "pair" not in row]
    assert all(row["tokenizer"]["equal"] and row["perplexity"] > 1 for row in files)
    assert "format against format" in (top / "run/report.md").read_text()


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_each_format_has_a_bundle_that_proves_itself(finished, called, tmp_path, kind):
    top, _, _ = finished
    bundles = top / "run/artifacts/bundle"
    assert sorted(path.name for path in bundles.iterdir()) == ["gguf", "gguf.tar", "onnx", "onnx.tar"]
    shutil.unpack_archive(bundles / f"{kind}.tar", tmp_path, filter="data")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "run.py", "--prompt-tokens", "8", "--new-tokens", "4", "--runs", "1"],
        cwd=tmp_path / kind, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["passed"] is True, done.stderr
    assert result["quality"]["kl_nats"] == pytest.approx(result["expected"]["kl_nats"], rel=0.2, abs=1e-3)
    assert called("verify", tmp_path / kind)[0] == 0 and called("verify", bundles / f"{kind}.tar")[0] == 0
    golden = json.loads((tmp_path / kind / "golden.json").read_text())
    assert golden["teacher"] == "the profile's logit cache" and len(golden["prompts"]) == 4
    (tmp_path / kind / "README.md").write_text("tampered")
    code, _, stderr = called("verify", tmp_path / kind)
    assert code == 4 and "README.md" in stderr


def test_bundles_can_be_left_out_without_computing_anything(finished, called, rebuild):
    top, teacher, first = finished
    for value, present in (("false", False), ("true", True)):
        code, logged = rebuild(teacher, top / "run", "--set", f"export.bundle={value}", cache=top / "cache")
        assert code == first.returncode
        assert "running" not in logged and (top / "run/artifacts/bundle").is_dir() == present, logged[-2000:]
        assert any("bundle" in name for name in artifact_digests(top / "run")) == present
    assert called("verify", top / "run")[0] == 0


def test_the_delivered_student_loads_in_transformers(finished):
    from transformers import AutoModelForCausalLM

    top, _, _ = finished
    model = AutoModelForCausalLM.from_pretrained(top / "run/artifacts/hf")
    assert model.config.num_experts == 4


def test_the_manifest_covers_every_delivered_file_and_verify_checks_it(finished, called):
    top, _, _ = finished
    delivered = {
        path.relative_to(top / "run").as_posix() for path in (top / "run/artifacts").rglob("*") if path.is_file()
    }
    assert delivered == set(artifact_digests(top / "run"))
    assert called("verify", top / "run")[0] == 0


def test_a_second_build_does_no_work(finished, rebuild):
    top, teacher, first = finished
    before = (top / "run/report.json").read_bytes()
    code, logged = rebuild(teacher, top / "run", cache=top / "cache")
    assert code == first.returncode and "nothing to do: every stage is up to date" in logged
    assert (top / "run/report.json").read_bytes() == before


def test_another_folder_takes_the_profile_from_the_cache(finished, rebuild):
    top, teacher, _ = finished
    code, logged = rebuild(teacher, top / "again", "--until", "profile", cache=top / "cache")
    assert code == 0 and "taken from the cache" in logged
    assert read_manifest(top / "again/profile").files == read_manifest(top / "run/profile").files


@pytest.mark.slow
def test_kill_nine_in_every_stage_gives_the_same_artifacts(finished, rebuild):
    """Another folder and cache: one build killed six times, as soon as each stage has begun, ends with the same bytes."""
    top, teacher, _ = finished
    run, cache = top / "killed", top / "cache-killed"
    for stage in STAGE_NAMES:
        kill_in(stage, teacher, run, cache)
        assert read_manifest(run) is None
    code, logged = rebuild(teacher, run, cache=cache)
    assert code in (0, 10), logged[-4000:]
    assert artifact_digests(run) == artifact_digests(top / "run")


def kill_in(stage: str, teacher: Path, run: Path, cache: Path) -> None:
    """Start the build, and kill -9 its process group when `stage` has begun."""
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "MOE_EDGE_CACHE": str(cache)}
    process = subprocess.Popen(
        command(teacher, run),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    begun = (run / stage / ".key", run / stage / "manifest.json")  # a short stage may be over before we look again
    while not any(path.exists() for path in begun) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


SAVES_EVERY_STEP = (
    "import moe_edge.distillation.checkpoints as c; c.SAVE_INTERVAL_S = 0.0; from moe_edge.cli.main import main; main()"
)
FORTY_STEPS = "distill.stages=[{stage_name: all, steps: 40, learning_rate: 0.001}]"


@pytest.mark.slow
def test_kill_nine_between_two_steps_of_training_changes_no_byte(finished, rebuild):
    """SIGKILL once the first checkpoint is whole, far from the last step; the next build goes on behind it."""
    top, teacher, _ = finished
    until = ("--until", "distill", "--set", FORTY_STEPS)
    code, logged = rebuild(teacher, top / "straight", *until, cache=top / "cache")
    assert code == 0 and "resuming" not in logged, logged[-3000:]
    run = top / "shot"
    arguments = command(teacher, run, *until)[3:]
    process = subprocess.Popen(
        [sys.executable, "-c", SAVES_EVERY_STEP, *arguments],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "MOE_EDGE_CACHE": str(top / "cache")},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    folder, deadline = run / "distill" / "checkpoints" / "0-all", time.monotonic() + 300
    while latest_checkpoint(folder) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    reached = step_of(latest_checkpoint(folder))
    assert 0 < reached < 40 and read_manifest(run / "distill") is None
    code, logged = rebuild(teacher, run, *until, cache=top / "cache")
    assert code == 0 and f"resuming 'all' behind step {reached} of 40" in logged
    assert read_manifest(run / "distill").files == read_manifest(top / "straight" / "distill").files
    log = (run / "distill" / "train_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 41))


@pytest.fixture
def plain_export(called, monkeypatch):
    """`moe-edge export` of a checkpoint, in this process: exit code, stdout and stderr."""

    def run(model, out, cache):
        monkeypatch.setenv("MOE_EDGE_CACHE", str(cache))
        return called(
            "export", model, "--target", "cpu", "--set", "export.formats=[gguf]", "--set", "export.gguf.types=[Q8_0]",
            "--set", "target.runtime.threads=1", "--out", out, "--json",
        )  # fmt: skip

    return run


def test_plain_exports_into_one_folder_are_of_the_model_that_was_given(finished, called, plain_export, tmp_path):
    """The second checkpoint has the first one's name and size; its files must be its own."""
    top, teacher, _ = finished
    model = tmp_path / "model"
    shutil.copytree(teacher, model)
    out = tmp_path / "out"
    code, stdout, stderr = plain_export(model, out, top / "cache")
    assert code == 0, stderr[-3000:]
    assert all((out / row["path"]).is_file() for row in json.loads(stdout)["artifacts"])
    assert called("verify", out / "artifacts/bundle/gguf")[0] == 0
    golden = json.loads((out / "artifacts/bundle/gguf/golden.json").read_text())
    assert golden["teacher"] == "the exported checkpoint itself"
    assert not (out / "artifacts/onnx").exists()
    before = artifact_digests(out)
    changed = load_model(model)
    with torch.no_grad():
        changed.model.norm.weight.mul_(torch.linspace(0.5, 2.0, len(changed.model.norm.weight)))
    changed.save_pretrained(model)
    code, _, stderr = plain_export(model, out, top / "cache")
    assert code == 0, stderr[-3000:]
    files = [name for name in before if name.endswith(".gguf")]
    assert files and all(artifact_digests(out)[name] != before[name] for name in files)


def test_a_plain_export_does_not_write_into_a_build(finished, plain_export):
    top, teacher, _ = finished
    code, _, stderr = plain_export(teacher, top / "run", top / "cache")
    assert code == 2 and "holds a build" in stderr
