"""Validation on fake runtimes with known logits, on real tiny models through transformers and llama.cpp, and of a benchmark."""

import json
from functools import partial
from pathlib import Path

import pytest

from moe_edge.contracts.config import BuildConfig, CalibrationConfig
from moe_edge.contracts.config_io import resolve_config
from moe_edge.contracts.errors import DeviceProblem, InputRejected, ResourceProblem
from moe_edge.contracts.targets_io import read_target
from moe_edge.devices.transport import Completed
from moe_edge.devices.worker import TOO_LARGE
from moe_edge.evaluation import validation
from moe_edge.evaluation.cells import Session, model_digest
from moe_edge.evaluation.validation import bench_artifact, held_out_rows, lone_model, measure, validate_artifact
from moe_edge.export.gguf import write_gguf
from moe_edge.export.gguf_split import split_gguf
from moe_edge.runtimes import hf
from tests.evaluation.fakes import InstantTransport, Opener, build_config, new_session, some_models
from tests.stages.inputs import opened
from tests.tiny import tiny_checkpoint


def test_every_model_is_measured_the_student_behind_the_files(tmp_path: Path) -> None:
    summary = measure(new_session(tmp_path / "out", Opener()), *some_models(tmp_path, "good.gguf"))
    good, student = summary.artifacts
    assert (good.path, student.path, summary.baseline.path) == ("artifacts/gguf/good.gguf", "artifacts/hf", "teacher")
    assert 0 < student.quality.kl_nats < good.quality.kl_nats < 0.05
    assert 0 < good.quality.kl_to_student_nats < good.quality.kl_nats
    assert student.quality.kl_to_student_nats is None and student.quality.student_reason
    assert good.quality.n_tokens == 3 * 19
    assert good.quality.teacher_perplexity == student.quality.teacher_perplexity
    assert summary.baseline.quality.perplexity == good.quality.teacher_perplexity
    assert good.speed.n_runs == 2 and good.speed.decode_tokens_per_s == pytest.approx(500)
    assert good.device["cores"] >= 1 and "label" not in good.device, "what the speed stands for depends on the target"
    assert summary.with_student and summary.versions["torch"] and summary.machine["cores"] >= 1


def test_broken_artifacts_are_failures_and_the_others_go_on(tmp_path: Path) -> None:
    models = some_models(tmp_path, "broken.gguf", "unreadable.gguf", "good.gguf", "killed.gguf")
    broken, unreadable, good, killed, _ = measure(new_session(tmp_path / "out", Opener()), *models).artifacts
    assert broken.quality.kl_nats is None and "NaN" in broken.quality.reason
    assert unreadable.quality.kl_nats is None and "cannot load" in unreadable.quality.reason
    assert good.quality.kl_nats is not None and good.speed.decode_tokens_per_s is not None
    assert (killed.speed.decode_tokens_per_s, killed.speed.n_runs) == (None, 0)
    assert killed.speed.reason.startswith("failed:oom")


def test_what_must_be_said_is_said(tmp_path: Path) -> None:
    """Too little text, and a quantized cache where GGUF files were measured in one."""
    models = some_models(tmp_path, "good.gguf")
    short = new_session(tmp_path / "out", Opener(), build_config(tokens=4096), kv_cache="q8_0")
    notes = measure(short, *models).notes
    assert any("has only 60 tokens, 4096 were asked for" in note for note in notes)
    assert any("q8_0 KV cache and flash attention" in note for note in notes)
    enough = new_session(tmp_path / "out", Opener(), build_config(tokens=60))
    assert not any("KV cache" in note or "asked for" in note for note in measure(enough, *models).notes)


def _real_text(tmp_path: Path) -> BuildConfig:
    """A configuration whose held-out text is two rows of 32 tokens."""
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    limits = {"kl_to_teacher_nats": 1e-6, "host_speed": True}
    config = build_config(limits, text=str(tmp_path / "text.txt"), tokens=64)
    return config.model_copy(update={"calibration": CalibrationConfig(sequence_length=32)})


def test_a_real_checkpoint_is_its_own_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    checkpoint = tiny_checkpoint(tmp_path, "qwen3_moe", name="teacher")
    result = validate_artifact(checkpoint, opened(checkpoint), _real_text(tmp_path), tmp_path / "out")
    (artifact,) = result.artifacts
    assert artifact.quality.kl_nats == pytest.approx(0, abs=1e-9)
    assert artifact.quality.n_tokens == 62
    assert artifact.speed.n_runs == 2 and artifact.speed.decode_tokens_per_s > 0
    assert artifact.memory.peak_rss_mib > artifact.memory.baseline_rss_mib
    assert (result.verdict, artifact.path, artifact.device["label"]) == ("pass", "teacher", "target")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result.to_dict()


def test_real_checkpoints_that_differ_fail_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, other = (tiny_checkpoint(tmp_path, "qwen3_moe", name=f"m{seed}", seed=seed) for seed in (0, 1))
    monkeypatch.setattr(validation, "open_transport", lambda address: InstantTransport())
    result = validate_artifact(other, opened(teacher), _real_text(tmp_path))
    assert result.artifacts[0].quality.kl_nats > 0.01
    assert result.verdict == "fail" and "kl_to_teacher_nats" in result.reasons[0]


def test_a_teacher_that_does_not_fit_is_judged_layer_by_layer_and_its_speed_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = (tiny_checkpoint(tmp_path, "qwen3_moe", name=f"m{seed}", seed=seed) for seed in (0, 1))
    write_gguf(other, tmp_path / "m.gguf", name="m")
    config, teacher = _real_text(tmp_path), opened(first)

    class TooLarge(InstantTransport):
        def run(self, argv: object, stdin: bytes, timeout_s: float) -> Completed:
            if Path(json.loads(stdin)["path"]).suffix == ".gguf":
                return super().run(argv, stdin, timeout_s)
            return Completed(TOO_LARGE, b"", "not measured: the model does not fit into memory")

    monkeypatch.setattr(validation, "open_transport", lambda address: TooLarge())
    whole = validate_artifact(tmp_path / "m.gguf", teacher, config)
    monkeypatch.setattr(hf, "fits_in_memory", lambda *given, **more: False)
    monkeypatch.setattr(hf, "load_student", lambda *given: pytest.fail("the teacher was loaded whole"))
    streamed = validate_artifact(tmp_path / "m.gguf", teacher, config)
    kl_nats = [result.artifacts[0].quality.kl_nats for result in (streamed, whole)]
    assert kl_nats[0] == pytest.approx(kl_nats[1], rel=1e-4)
    speed = streamed.baseline.speed
    assert speed.decode_tokens_per_s is None and "not measured: the model does not fit" in speed.reason
    for wrong in (bench_artifact, partial(validate_artifact, teacher=teacher)):
        with pytest.raises(ResourceProblem, match="not measured: the model does not fit"):
            wrong(other, config=config)


def test_a_split_file_is_judged_and_hashed_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen3_moe")
    write_gguf(checkpoint, tmp_path / "m.gguf", name="m")
    size = (tmp_path / "m.gguf").stat().st_size
    parts, teacher = split_gguf(tmp_path / "m.gguf", 200_000), opened(checkpoint)
    monkeypatch.setattr(validation, "open_transport", lambda address: InstantTransport())
    (artifact,) = validate_artifact(parts[0], teacher, _real_text(tmp_path)).artifacts
    assert len(parts) > 1 and artifact.quality.kl_nats < 1e-4 and artifact.path == parts[0].name
    assert size <= artifact.bytes == sum(part.stat().st_size for part in parts)
    before, raw = model_digest(parts[0]), bytearray(parts[-1].read_bytes())
    parts[-1].write_bytes(bytes([*raw[:-1], raw[-1] ^ 1]))
    assert model_digest(parts[0]) != before, "another last part is another model"
    for wrong in (bench_artifact, partial(validate_artifact, teacher=teacher)):
        with pytest.raises(InputRejected, match="not the first part"):
            wrong(parts[-1], config=_real_text(tmp_path))


def test_a_file_that_does_not_open_is_an_error_and_not_a_failed_cell(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen3_moe")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(8))
    with pytest.raises(InputRejected):
        validate_artifact(tmp_path / "x.gguf", opened(checkpoint), _real_text(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_remote_device_is_refused_before_any_work(tmp_path: Path) -> None:
    teacher, config = opened(tiny_checkpoint(tmp_path, "qwen3_moe")), build_config(device="ssh://me@board")
    for command in (bench_artifact, partial(validate_artifact, teacher=teacher)):
        with pytest.raises(DeviceProblem):
            command(tmp_path / "none.gguf", config=config, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_held_out_text_may_be_anything_but_calibration_text(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen3_moe")
    rows_NS = held_out_rows(_real_text(tmp_path), checkpoint)
    assert rows_NS.shape == (2, 32)
    session = Session(_real_text(tmp_path), rows_NS, tmp_path, InstantTransport())
    assert session.rows_NS.size == 64 and lone_model(checkpoint).shown == checkpoint.name


def test_bench_raises_instead_of_returning_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(8))
    with pytest.raises(InputRejected, match="could not be measured"):
        bench_artifact(broken, build_config())


def test_bench_returns_speed_and_memory_and_always_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = InstantTransport()
    monkeypatch.setattr(validation, "open_transport", lambda address: transport)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for _ in range(2):
        result = bench_artifact(tmp_path / "x.gguf", build_config(), tmp_path / "bench")
    assert transport.measured == ["x.gguf"] * 2
    assert (result.speed.n_runs, result.runtime, result.device["label"]) == (2, "llama_cpp", "target")
    assert json.loads((tmp_path / "bench" / "results.json").read_text()) == result.to_dict()


@pytest.mark.parametrize(("asked", "used"), [("auto", "f16"), ("f16", "f16"), ("q8_0", "q8_0")])
def test_a_single_file_is_timed_in_the_targets_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, used: str
) -> None:
    transport = InstantTransport()
    monkeypatch.setattr(validation, "open_transport", lambda address: transport)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    shape = ("validate.prompt_tokens=4", "validate.new_tokens=3", "validate.repetitions=2")
    config = resolve_config(read_target("cpu"), settings=[f"target.runtime.kv_cache={asked}", *shape])
    assert bench_artifact(tmp_path / "x.gguf", config).device["kv_cache"] == used
    assert transport.jobs[0]["options"] == ({} if used == "f16" else {"kv_cache": used})


def test_a_real_file_is_timed_with_an_8_bit_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    write_gguf(tiny_checkpoint(tmp_path, "qwen3_moe"), tmp_path / "x.gguf", name="x")
    settings = ["target.runtime.kv_cache=q8_0", "validate.prompt_tokens=4", "validate.new_tokens=3"]
    config = resolve_config(read_target("cpu"), settings=[*settings, "validate.repetitions=1"])
    result = bench_artifact(tmp_path / "x.gguf", config)
    assert result.speed.decode_tokens_per_s > 0 and result.device["kv_cache"] == "q8_0"
