"""The command line: exit codes, one clear message per bad input, nothing lost; run as a user runs it, in a process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from moe_edge.api import configure, find_checkpoint
from moe_edge.contracts.errors import GateFailed
from moe_edge.contracts.manifest import MANIFEST_SCHEMA, Manifest
from moe_edge.planning.allocation import header_plan
from moe_edge.planning.disk import stage_bytes
from moe_edge.storage.folders import hash_folder
from tests.exporting.gguf_models import REPRESENTABLE
from tests.runtimes.test_gguf_header import HUGE_ARRAY
from tests.tiny import tiny_checkpoint


def run(*arguments, cwd=None, timeout=120, **environment):
    return subprocess.run(
        [sys.executable, "-m", "moe_edge", *map(str, arguments)], capture_output=True, text=True, timeout=timeout, cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.getcwd(), "COLUMNS": "200"} | environment,
    )  # fmt: skip


def test_help_is_quick_to_load_nothing_heavy():
    done = run("--help")
    assert done.returncode == 0 and "build" in done.stdout
    heavy = "('torch', 'transformers', 'llama_cpp', 'onnxruntime')"
    probe = f"import moe_edge.cli.main, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip() == "[]"


def test_targets(called):
    code, out, _ = called("targets", "list")
    assert code == 0 and {"cpu", "mobile", "jetson", "raspberry-pi-5"} <= set(out.split())
    code, out, _ = called("targets", "show", "jetson", "--json")
    assert code == 0 and json.loads(out)["name"] == "jetson"
    code, out, _ = called("targets", "show", "jetson")
    assert code == 0 and "hardware.bandwidth_gb_per_s" in out and "1e9 bytes per second [datasheet" in out


BAD_PATTERN = "distill.stages=[{stage_name: a, parameter_lr_multipliers: [{pattern: '(', lr_multiplier: 1}]}]"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["build", "/no/such/folder"], 2, ["/no/such/folder"]),
        (["build", "--target", "cpuu"], 2, ["did you mean 'cpu'"]),
        (["build", "--set", "plan.critreion=ean"], 2, ["did you mean 'criterion'"]),
        (["build", "--until", "distil"], 2, ["stages:", "distill"]),
        (["build", "--from", "export", "--until", "plan"], 2, ["'export' comes after until 'plan'", "stages:"]),
        (["build", "--device", "ssh://pi"], 7, ["ssh://pi", "--device local"]),
        (["build", "--set", "validate.device=phone"], 2, ["unknown device 'phone'"]),
        (["build", "--set", "export.onnx.provider=cuda", "--set", "export.onnx.precision=fp32"], 2, ["float16"]),
        (["build", "--set", BAD_PATTERN], 2, ["'(' is not a regular expression"]),
        (["build", "--config", "none.yaml"], 2, ["no such file"]),
        (["build", "--nonsense"], 2, []),
        (["verify", "."], 2, ["manifest.json"]),
        (["cache", "gc", "--keep", "lots"], 2, ["--keep"]),
        (["targets", "check", "none.yaml"], 2, ["none.yaml"]),
    ],
)
def test_usage_errors_come_before_any_work(called, monkeypatch, arguments, code, words):
    monkeypatch.setattr("moe_edge.pipeline.locked", lambda *_: pytest.fail("nothing is begun"))
    got, out, err = called(*arguments)
    assert got == code and out == ""
    assert all(word in err for word in words) and "Traceback" not in err


def test_config_errors_name_the_line(called, tmp_path):
    (tmp_path / "b.yaml").write_text("plan:\n  criterion: auto\n  topk: 2\n")
    code, _, err = called("build", "--config", tmp_path / "b.yaml")
    assert code == 2 and "line 3" in err and "did you mean 'top_k'" in err


def test_rejected_inputs_are_four(called, tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text('{"model_type": "llama"}')
    code, _, err = called("build", dense, "--out", tmp_path / "o")
    assert code == 4 and "Traceback" not in err
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "qwen3_moe"}')
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    code, _, err = called("build", pickled, "--out", tmp_path / "o")
    assert code == 4 and "safetensors" in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("family", "formats", "words"),
    [
        ("phimoe", "[gguf]", "approximates the sparsemixer routing"),
        ("deepseek_v2", "[gguf, onnx]", "--set export.formats=[gguf]"),
    ],
)
def test_a_plain_export_of_what_a_format_cannot_hold_is_refused_before_any_work(
    called, tmp_path, family, formats, words
):
    model = tiny_checkpoint(tmp_path, family, **REPRESENTABLE.get(family, {}))
    code, _, err = called("export", model, "--out", tmp_path / "o", "--set", f"export.formats={formats}")
    assert code == 4 and "cannot represent this model" in err and words in err and "Traceback" not in err
    assert not (tmp_path / "o" / "export").exists()


def test_a_hostile_chat_template_is_refused_before_anything_is_written(called, tmp_path):
    model = tiny_checkpoint(tmp_path, "qwen3_moe")
    (model / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    code, _, err = called("export", model, "--out", tmp_path / "o")
    assert code == 4 and "__class__" in err and "Traceback" not in err
    assert not (tmp_path / "o" / "export").exists()


@pytest.mark.parametrize("broken", ["template", "end"])
def test_a_build_whose_tokenizer_cannot_be_exported_is_refused_before_any_work(called, tmp_path, broken):
    model = tiny_checkpoint(tmp_path, "qwen3_moe")
    if broken == "template":
        (model / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    else:
        settings = model / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": None}))
        for name in ("config.json", "generation_config.json"):
            parsed = json.loads((model / name).read_text()) if (model / name).is_file() else {}
            (model / name).write_text(json.dumps(parsed | {"eos_token_id": None}))
    code, _, err = called("build", model, "--out", tmp_path / "o")
    assert code == 4 and "Traceback" not in err and not (tmp_path / "o").exists()
    assert ("__class__" if broken == "template" else "end-of-sequence") in err


def test_a_model_that_is_the_current_folder_lends_its_name(called, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_checkpoint(tmp_path, "qwen3_moe", name="Tiny-Model"))
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    code, out, err = called("export", ".", "--set", "export.formats=[gguf]", "--set", "target.runtime.threads=1")
    assert code == 0, err
    assert "gguf/Tiny-Model-6e-" in out
    assert os.listdir("runs") == ["Tiny-Model-cpu"]


HEAVY = ("torch", "transformers", "llama_cpp", "onnxruntime")


def light(*arguments):
    """Run the CLI in a fresh process: exit code, stderr, and which heavy modules it imported on its way out."""
    probe = (
        "import sys, moe_edge.cli.main as cli\n"
        f"try:\n cli.main(sys.argv[1:])\nfinally:\n print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr, done.stdout.strip()


@pytest.mark.parametrize("command", ["bench", "validate", "verify"])
def test_a_crafted_gguf_is_refused_in_a_moment(tmp_path, command):
    """Before torch or a runtime is imported, let alone a worker started: that alone takes longer than the two seconds."""
    bad = tmp_path / "x.gguf"
    bad.write_bytes(HUGE_ARRAY)
    assert len(HUGE_ARRAY) == 49
    options = ["--teacher", tmp_path] if command == "validate" else []
    if command == "verify":
        files = hash_folder(tmp_path)
        manifest = Manifest(schema=MANIFEST_SCHEMA, stage="bundle", key="k", digest="d", files=files)
        (tmp_path / "manifest.json").write_text(manifest.to_json())
    started = time.monotonic()
    code, err, imported = light(command, tmp_path if command == "verify" else bad, *options)
    assert code == 4 and "array of 9223372036854775808" in err and "Traceback" not in err
    assert imported == "[]" and time.monotonic() - started < 20
    if command == "verify":
        code, err, _ = light("verify", bad)
        assert code == 4 and "array of 9223372036854775808" in err, "the file alone, without a manifest"


def test_crafted_folders_are_refused_as_early(tmp_path):
    checkpoint, graph = tmp_path / "hf", tmp_path / "onnx"
    for folder in (checkpoint, graph):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "genai_config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"\xff" * 64)
    (graph / "model.onnx").write_bytes(b"\xff" * 64)
    for folder in (checkpoint, graph):
        code, err, imported = light("bench", folder, "--out", tmp_path / "o")
        assert code == 4 and folder.name in err and "Traceback" not in err and imported == "[]"
    assert not (tmp_path / "o").exists()


def test_verify_names_the_file_and_ends_with_four(called, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text("as delivered")
    files = hash_folder(tmp_path / "b")
    manifest = Manifest(schema=MANIFEST_SCHEMA, stage="bundle", key="k", digest="d", files=files)
    (tmp_path / "b" / "manifest.json").write_text(manifest.to_json())
    assert called("verify", tmp_path / "b")[0] == 0
    (tmp_path / "b" / "a.txt").write_text("as Delivered")
    code, out, err = called("verify", tmp_path / "b")
    assert code == 4 and out == "" and "a.txt: changed" in err


@pytest.mark.parametrize(
    ("settings", "code", "word"), [("plan.experts=1", 2, "top"), ("target.budget.weights=1KiB", 3, "KiB")]
)
def test_impossible_budgets_are_refused_before_any_work(called, tmp_path, settings, code, word):
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe")
    got, _, err = called("build", teacher, "--out", tmp_path / "o", "--set", settings)
    assert got == code and word in err and "Traceback" not in err
    assert not (tmp_path / "o").exists()


def test_an_unsafe_ratio_stops_with_three_names_the_safe_one_and_can_be_forced(called, tmp_path, monkeypatch):
    """The demo teacher with one expert of sixteen: beyond 2 nats per token before recovery."""
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    small = (
        "calibration.tokens=512", "calibration.sequence_length=64", "profile.cka_tokens=0", "plan.criterion=frequency",
        "plan.tokens=256", "plan.curve_tokens=128", "plan.experts=1", "plan.top_k=1",
    )  # fmt: skip
    wishes = [word for setting in small for word in ("--set", setting)]
    code, _, err = called("build", "--until", "plan", "--out", tmp_path / "o", *wishes)
    assert code == 3 and "1 of 16 experts (top-1)" in err and "the safe limit" in err
    safe = re.search(r"next: +--set plan\.experts=(\d+), or --set plan\.force=true", err)
    assert safe and 1 < int(safe[1]) < 16
    assert not (tmp_path / "o/plan/plan.json").exists() and (tmp_path / "o/plan/curve.json").exists()
    forced = [*wishes, "--set", "plan.force=true"]
    assert called("build", "--until", "plan", "--out", tmp_path / "o", *forced)[0] == 0
    _, page, _ = called("plan", "--out", tmp_path / "o", *forced)
    assert "measured 1 of 16 experts, top-1" in page and "- Unsafe: 94% of the experts are dropped" in page


def test_a_dry_run_reads_headers_only(called, tmp_path):
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe")
    code, out, _ = called("build", teacher, "--dry-run", "--json", "--out", tmp_path / "o")
    assert code == 0 and isinstance(json.loads(out), dict)
    assert not (tmp_path / "o").exists()


def test_a_held_folder_is_five(tmp_path):
    from moe_edge.pipeline import locked

    teacher = tiny_checkpoint(tmp_path, "qwen3_moe")
    with locked(tmp_path / "o"):
        done = run("build", teacher, "--out", tmp_path / "o")
    assert done.returncode == 5 and "in use by another build" in done.stderr and str(os.getpid()) in done.stderr


def test_a_full_disk_is_six(called, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "x.bin")

    monkeypatch.setattr("moe_edge.api.configure", full)
    code, _, err = called("build")
    assert code == 6 and "disk is full" in err and "resumes" in err


def test_a_stage_asks_for_the_disk_that_it_writes_to_and_no_more(called, tmp_path, monkeypatch):
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe")
    config = configure("cpu", teacher)
    sizes = stage_bytes(header_plan(find_checkpoint(config).headers, config), config)
    free = sizes["profile"] + sizes["plan"] + sizes["compress"]
    monkeypatch.setattr("moe_edge.storage.folders.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    ran: list[str] = []
    monkeypatch.setattr("moe_edge.pipeline.run_stages", lambda _state, _start, until: ran.append(until))
    for until, code in (("profile", 0), ("compress", 0), ("distill", 6)):
        got, _, err = called("build", teacher, "--until", until, "--out", tmp_path / "o")
        assert got == code and ("not enough disk space" in err) == (code == 6)
    assert ran == ["profile", "compress"]


def test_missed_gates_are_ten_and_bugs_are_one(called, monkeypatch):
    def missed(*_, **__):
        raise GateFailed("missed", why="KL")

    monkeypatch.setattr("moe_edge.api.configure", missed)
    assert called("build")[0] == 10
    monkeypatch.setattr("moe_edge.api.configure", lambda *_, **__: 1 / 0)
    code, _, err = called("build")
    assert code == 1 and "bug in moe-edge" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_with_their_code_and_free_the_lock(tmp_path, number, code):
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe")
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_edge", "build", str(teacher), "--out", str(tmp_path / "o"),
         "--set", "calibration.sequence_length=64"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd(), "MOE_EDGE_CACHE": str(tmp_path / "c")},
    )  # fmt: skip
    for _ in range(600):
        if (tmp_path / "o/profile/partial").exists():  # earlier, an import may swallow the signal
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "resumes" in err
    assert not (tmp_path / "o/.lock.json").exists()


def test_doctor_finds_this_machine_ready(called):
    code, out, _ = called("doctor")
    assert (
        code in (0, 5)
        and "llama-cpp-python" in out
        and "BAD" not in out.replace("BAD disk", "").replace("BAD memory", "")
    )


def test_cache_commands(called, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path))
    assert called("cache", "ls")[0] == 0
    assert called("cache", "verify")[0] == 0
    (tmp_path / "profiles/unfinished").mkdir(parents=True)
    code, out, _ = called("cache", "gc", "--keep", "1GiB")
    assert code == 0 and "deleted 1" in out


@pytest.mark.parametrize("out", ["file", "file/below", "a" * 300])
def test_a_folder_that_cannot_be_made_is_a_usage_error(called, tmp_path, out):
    (tmp_path / "file").touch()
    code, _, err = called("build", "--out", str(tmp_path / out), "--until", "profile")
    assert code == 2 and "the path cannot be used" in err and out in err
