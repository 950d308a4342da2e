"""The planned KV cache is the one in which GGUF files are judged and timed, and the results say which it was."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_edge.contracts.config_io import resolve_config
from moe_edge.contracts.targets_io import read_target
from moe_edge.devices.transport import Completed
from moe_edge.export.gguf import write_gguf
from moe_edge.stages import validate
from moe_edge.stages.report import _next_commands
from tests.compression.action_helpers import HALF, plan8
from tests.stages.test_validate import InstantTransport, KnownLogits, _run_folder, _session
from tests.tiny import tiny_checkpoint


class Listening:
    """An opener that remembers what each runtime is told."""

    def __init__(self) -> None:
        self.told: dict[str, dict[str, str]] = {}

    def __call__(self, kind: str, path: Path, threads: int, context_length: int, **options: str) -> KnownLogits:
        self.told[kind] = options
        return KnownLogits(0.1)


class Recording(InstantTransport):
    """Keeps the jobs."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[dict] = []

    def run(self, argv: object, stdin: bytes, timeout_s: float) -> Completed:
        self.jobs.append(json.loads(stdin))
        return super().run(argv, stdin, timeout_s)


def session_with(context, cache):
    plain = _session(context, Listening())
    return replace(plain, transport=Recording(), kv_cache=cache)


def test_gguf_files_are_judged_and_timed_in_the_planned_precision(tmp_path: Path) -> None:
    context = _run_folder(tmp_path, ("good.gguf",))
    session = session_with(context, "q8_0")
    summary = validate.validate_build(session, context)
    assert session.opener.told == {"llama_cpp": {"kv_cache": "q8_0"}, "hf": {}}
    options = {job["runtime"]: job["options"] for job in session.transport.jobs}
    assert options == {"llama_cpp": {"kv_cache": "q8_0"}, "hf": {}}
    good, student = summary["artifacts"]
    assert good["device"]["kv_cache"] == "q8_0" and "kv_cache" not in student["device"]
    assert any("q8_0 KV cache and flash attention" in note for note in summary["notes"])


def test_another_precision_is_another_cell_and_float16_needs_no_option(tmp_path: Path) -> None:
    context = _run_folder(tmp_path, ("good.gguf",))
    validate.validate_build(session_with(context, "q8_0"), context)
    session = session_with(context, "f16")
    summary = validate.validate_build(session, context)
    assert session.opener.told["llama_cpp"] == {}, "measured again"
    assert [job["runtime"] for job in session.transport.jobs] == ["llama_cpp"]
    assert summary["artifacts"][0]["device"]["kv_cache"] == "f16"
    assert not any("KV cache" in note for note in summary["notes"])


def test_the_precision_comes_from_the_plan_or_from_the_target(tmp_path: Path) -> None:
    plan = plan8(kept=HALF)
    plan = plan.model_copy(update={"estimate": plan.estimate.model_copy(update={"kv_precision": "q8_0"})})
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert validate.planned_cache(SimpleNamespace(inputs={"plan": tmp_path})) == "q8_0"
    for asked, expected in (("auto", "f16"), ("f16", "f16"), ("q8_0", "q8_0")):
        config = resolve_config(read_target("cpu"), settings=[f"target.runtime.kv_cache={asked}"])
        assert validate.wished_cache(config) == expected


def test_a_real_file_is_timed_with_an_8_bit_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    write_gguf(tiny_checkpoint(tmp_path, "qwen3_moe"), tmp_path / "x.gguf", name="x")
    settings = ["target.runtime.kv_cache=q8_0", "validate.prompt_tokens=4", "validate.new_tokens=3"]
    config = resolve_config(read_target("cpu"), settings=[*settings, "validate.repetitions=1"])
    result = validate.bench_artifact(tmp_path / "x.gguf", config)
    assert result["speed"]["decode_tokens_per_s"] > 0 and result["device"]["kv_cache"] == "q8_0"


def test_the_report_says_how_to_run_the_file_as_planned() -> None:
    artifact = SimpleNamespace(format="gguf", path="artifacts/gguf/x.gguf")
    plan = {"estimate": {"kv_precision": "q8_0", "context_length": 4096}}
    bench, run, verify = _next_commands(Path("r"), [artifact, artifact], "pass", plan)
    assert bench == "moe-edge bench r/artifacts/gguf/x.gguf --set target.runtime.kv_cache=q8_0"
    assert run == "llama-cli -m r/artifacts/gguf/x.gguf -c 4096 -fa on -ctk q8_0 -ctv q8_0" and "verify" in verify
    plain = {"estimate": {"kv_precision": "f16", "context_length": None}}
    assert _next_commands(Path("r"), [artifact], "pass", plain)[:2] == [
        "moe-edge bench r/artifacts/gguf/x.gguf",
        "llama-cli -m r/artifacts/gguf/x.gguf",
    ]
