"""validate on fake runtimes with known logits, and once on a real tiny model through transformers."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.config import BuildConfig, CalibrationConfig
from moe_edge.contracts.errors import DeviceProblem, InputRejected, ResourceProblem
from moe_edge.contracts.report import Artifact
from moe_edge.contracts.targets_io import load_target
from moe_edge.devices.transport import Completed
from moe_edge.devices.worker import TOO_LARGE
from moe_edge.evaluation import cells as validate_cells
from moe_edge.evaluation.cells import Session
from moe_edge.export.gguf import write_gguf
from moe_edge.export.gguf_split import split_gguf
from moe_edge.runtimes import hf
from moe_edge.stages import validate
from tests.tiny import tiny_checkpoint

SAMPLES = {
    "schema": "moe-edge/samples@1",
    "runs": [{"issued_ns": 0, "prefilled_ns": 5_000_000, "token_ns": [6_000_000, 8_000_000, 10_000_000]}] * 2,
    "load_ns": 1,
    "baseline_rss_bytes": 10**7,
    "peak_rss_bytes": 10**8,
    "peak_uss_bytes": None,
}
VOCAB = 16


class InstantTransport:
    """A device on which every artifact decodes 500 tokens/s, unless its name says that it is killed."""

    address = "fake"

    def __init__(self) -> None:
        self.measured: list[str] = []

    def run(self, argv: object, stdin: bytes, timeout_s: float) -> Completed:
        name = Path(json.loads(stdin)["path"]).name
        self.measured.append(name)
        return Completed(-9, b"", "") if "killed" in name else Completed(0, json.dumps(SAMPLES).encode(), "")


class KnownLogits:
    """A bigram model: the teacher's table plus noise that the file's name says."""

    def __init__(self, noise: float, vocab: int = VOCAB) -> None:
        self.vocab = vocab
        table_VV = np.random.default_rng(0).normal(0, 2, (vocab, vocab))
        self._table_VV = (table_VV + np.random.default_rng(1).normal(0, 1, (vocab, vocab)) * noise).astype(np.float32)

    def __enter__(self) -> "KnownLogits":
        return self

    def __exit__(self, *error: object) -> None: ...

    def logits(self, ids_S: np.ndarray) -> np.ndarray:
        return self._table_VV[ids_S]


NOISE = {"teacher": 0.0, "hf": 0.05, "good.gguf": 0.1, "bad.gguf": 3.0, "broken.gguf": np.nan}


class Opener:
    """Counts what it opens."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def __call__(self, kind: str, path: Path, threads: int, context_length: int) -> KnownLogits:
        self.opened.append(path.name)
        if path.name == "unreadable.gguf":
            raise InputRejected("llama.cpp cannot load this file")
        return KnownLogits(NOISE[path.name], VOCAB - 1 if path.name == "other.gguf" else VOCAB)


def _config(gates: dict[str, Any] | None = None, **settings: Any) -> BuildConfig:
    target = load_target("cpu").model_dump(by_alias=True)
    if gates is not None:
        target["gates"] = gates
    shape = {"prompt_tokens": 4, "new_tokens": 3, "repetitions": 2} | settings
    return BuildConfig.model_validate({"target": target, "validate": shape})


def _run_folder(tmp_path: Path, names: tuple[str, ...]) -> StageContext:
    """A run with fake files: what the pipeline would hand to the stage."""
    rows = []
    for name in names:
        path = tmp_path / "artifacts" / "gguf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"GGUF" + name.encode())
        rows.append(
            {"format": "gguf", "runtime": "llama_cpp", "path": f"artifacts/gguf/{name}", "quantization": "Q4_K_M",
             "bytes": path.stat().st_size, "bits_per_weight": 4.5}
        )  # fmt: skip
    for size, folder in ((100, tmp_path / "artifacts" / "hf"), (200, tmp_path / "elsewhere" / "teacher")):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(size))
    return StageContext(
        _config(),
        tmp_path / "elsewhere" / "teacher",
        "digest",
        tmp_path / "validate",
        {},
        {"export": {"artifacts": rows}},
    )


def _session(context: StageContext, opener: Opener, config: BuildConfig | None = None) -> Session:
    rows_NS = np.random.default_rng(2).integers(VOCAB, size=(3, 20))
    context.out.mkdir(exist_ok=True)
    return Session(config or context.config, rows_NS, context.out, InstantTransport(), opener)


def test_every_model_is_judged_and_the_good_one_passes(tmp_path: Path) -> None:
    context = _run_folder(tmp_path, ("good.gguf",))
    summary = validate.validate_build(_session(context, Opener()), context)
    good, student = (Artifact(**row) for row in summary["artifacts"])
    assert (good.path, student.path) == ("artifacts/gguf/good.gguf", "artifacts/hf")
    assert 0 < student.quality.kl_nats < good.quality.kl_nats < 0.05
    assert 0 < good.quality.kl_to_student_nats < good.quality.kl_nats
    assert student.quality.kl_to_student_nats is None and student.quality.student_reason
    assert good.quality.n_tokens == 3 * 19
    assert good.quality.teacher_perplexity == student.quality.teacher_perplexity
    assert summary["baseline"]["quality"]["perplexity"] == good.quality.teacher_perplexity
    assert good.speed.n_runs == 2 and good.speed.decode_tokens_per_s == pytest.approx(500)
    assert good.device["label"] == "target" and good.device["cores"] >= 1
    assert (summary["verdict"], summary["reasons"]) == ("pass", [])
    assert {gate["artifact"] for gate in summary["gates"]} == {"artifacts/gguf/good.gguf"}
    assert json.loads((context.out / "results.json").read_text()) == summary


def test_a_build_without_exports_is_gated_on_its_student(tmp_path: Path) -> None:
    """export.formats=[]: the student is its own reference, so what export may cost is not gated."""
    context = _run_folder(tmp_path, ())
    summary = validate.validate_build(_session(context, Opener()), context)
    assert {gate["artifact"] for gate in summary["gates"]} == {"artifacts/hf"} and summary["verdict"] == "pass"
    assert "kl_to_student_nats" not in {gate["name"] for gate in summary["gates"]}


def test_scratch_is_gone_and_raw_samples_stay(tmp_path: Path) -> None:
    context = _run_folder(tmp_path, ("good.gguf",))
    validate.validate_build(_session(context, Opener()), context)
    assert not (context.out / "scratch").exists()
    assert len(list((context.out / "raw").iterdir())) == 3  # artifact, student, teacher


def test_one_bad_artifact_fails_the_verdict_by_name(tmp_path: Path) -> None:
    context = _run_folder(tmp_path, ("good.gguf", "bad.gguf"))
    summary = validate.validate_build(_session(context, Opener()), context)
    assert summary["verdict"] == "fail"
    assert summary["reasons"] and all("bad.gguf" in reason for reason in summary["reasons"])


def test_broken_artifacts_are_failures_and_the_others_go_on(tmp_path: Path) -> None:
    context = _run_folder(tmp_path, ("broken.gguf", "unreadable.gguf", "good.gguf"))
    summary = validate.validate_build(_session(context, Opener()), context)
    broken, unreadable, good, _ = (Artifact(**row) for row in summary["artifacts"])
    assert broken.quality.kl_nats is None and "NaN" in broken.quality.reason
    assert unreadable.quality.kl_nats is None and "cannot load" in unreadable.quality.reason
    assert good.quality.kl_nats is not None
    assert summary["verdict"] == "fail"
    nulls = [gate for gate in summary["gates"] if gate["value"] is None]
    assert nulls and all(gate["reason"] and not gate["passed"] for gate in nulls)


def test_a_crash_while_measuring_is_a_failure_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NOISE, "killed.gguf", 0.1)
    context = _run_folder(tmp_path, ("killed.gguf",))
    summary = validate.validate_build(_session(context, Opener()), context)
    speed = summary["artifacts"][0]["speed"]
    assert (speed["decode_tokens_per_s"], speed["n_runs"]) == (None, 0)
    assert speed["reason"].startswith("failed:oom")
    assert any("failed:oom" in reason for reason in summary["reasons"])


def test_a_rerun_takes_finished_cells_and_repeats_only_failures(tmp_path: Path) -> None:
    context = _run_folder(tmp_path, ("good.gguf", "broken.gguf"))
    first = validate.validate_build(_session(context, Opener()), context)
    session = _session(context, again := Opener())
    second = validate.validate_build(session, context)
    assert second["artifacts"] == first["artifacts"]
    assert again.opened == ["teacher", "hf", "broken.gguf"]
    assert session.transport.measured == []
    (tmp_path / "artifacts" / "gguf" / "broken.gguf").write_bytes(b"GGUF")
    validate.validate_build(_session(context, third := Opener()), context)
    assert "good.gguf" not in third.opened


def test_killed_between_artifacts_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = _run_folder(tmp_path, ("good.gguf", "bad.gguf"))
    real: Callable[..., Any] = validate_cells.judge_runtime

    def killed_at_bad(runtime: Any, rows: Any, references: Any, label: str) -> Any:
        if "bad" in label:
            raise KeyboardInterrupt
        return real(runtime, rows, references, label)

    monkeypatch.setattr(validate_cells, "judge_runtime", killed_at_bad)
    with pytest.raises(KeyboardInterrupt):
        validate.validate_build(_session(context, Opener()), context)
    monkeypatch.setattr(validate_cells, "judge_runtime", real)
    validate.validate_build(_session(context, resumed := Opener()), context)
    assert resumed.opened == ["teacher", "hf", "bad.gguf"]


def test_other_text_is_another_cell(tmp_path: Path) -> None:
    context = _run_folder(tmp_path, ("good.gguf",))
    first = validate.validate_build(_session(context, Opener()), context)
    session = _session(context, Opener())
    other = replace(session, rows_NS=session.rows_NS[:2], digests={})
    second = validate.validate_build(other, context)
    assert second["artifacts"][0]["quality"]["n_tokens"] == 38 != first["artifacts"][0]["quality"]["n_tokens"]


def test_the_hosts_speed_is_labelled_and_not_gated_for_another_device(tmp_path: Path) -> None:
    context = _run_folder(tmp_path, ("good.gguf",))
    config = _config({"kl_to_teacher_nats": 1.0, "decode_tokens_per_s": 10**9, "host_speed": False})
    summary = validate.validate_build(_session(context, Opener(), config), context)
    assert summary["verdict"] == "pass"
    assert {gate["name"] for gate in summary["gates"]} == {"kl_to_teacher_nats"}
    assert {row["device"]["label"] for row in summary["artifacts"]} == {"host"}
    assert any("not gated" in note for note in summary["notes"])


def test_no_gates_is_not_a_pass(tmp_path: Path) -> None:
    context = _run_folder(tmp_path, ("good.gguf",))
    summary = validate.validate_build(_session(context, Opener(), _config({})), context)
    assert summary["verdict"] == "fail"
    assert "no gate is configured" in summary["reasons"][0]


def test_a_remote_device_is_refused_before_any_work(tmp_path: Path) -> None:
    context = _run_folder(tmp_path, ("good.gguf",))
    remote = StageContext(
        _config(device="ssh://me@board"), context.teacher, "digest", context.out, {}, context.summaries
    )
    with pytest.raises(DeviceProblem):
        validate.run(remote)
    assert not context.out.exists()


def test_a_single_artifact_of_another_vocabulary_is_an_error_and_not_a_failed_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NOISE, "other.gguf", 0.1)
    context = _run_folder(tmp_path, ("other.gguf",))
    session = _session(context, Opener())
    strict = replace(session, rows_NS=session.rows_NS % (VOCAB - 1), strict=True)
    with pytest.raises(InputRejected, match="vocabulary"):
        validate.validate_build(strict, context)
    assert not (context.out / "scratch").exists()


def test_held_out_text_that_is_too_short_is_said(tmp_path: Path) -> None:
    context = _run_folder(tmp_path, ("good.gguf",))
    summary = validate.validate_build(_session(context, Opener(), _config(tokens=4096)), context)
    assert any("has only 60 tokens, 4096 were asked for" in note for note in summary["notes"])


def _real_text(tmp_path: Path) -> BuildConfig:
    """A configuration whose held-out text is two rows of 32 tokens."""
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    config = _config({"kl_to_teacher_nats": 1e-6, "host_speed": True}, text=str(tmp_path / "text.txt"), tokens=64)
    return config.model_copy(update={"calibration": CalibrationConfig(sequence_length=32)})


def test_a_real_checkpoint_is_its_own_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe", name="teacher")
    summary = validate.validate_artifact(teacher, teacher, _real_text(tmp_path))
    artifact = Artifact(**summary["artifacts"][0])
    assert artifact.quality.kl_nats == pytest.approx(0, abs=1e-9)
    assert artifact.quality.n_tokens == 62
    assert artifact.speed.n_runs == 2 and artifact.speed.decode_tokens_per_s > 0
    assert artifact.memory.peak_rss_mib > artifact.memory.baseline_rss_mib
    assert summary["verdict"] == "pass"


def test_real_checkpoints_that_differ_fail_the_gate(tmp_path: Path) -> None:
    teacher, other = (tiny_checkpoint(tmp_path, "qwen3_moe", name=f"m{seed}", seed=seed) for seed in (0, 1))
    config = _real_text(tmp_path)
    session = Session(config, validate.held_out(config, teacher), tmp_path / "out", InstantTransport())
    candidates = validate.hf_candidate(teacher, tmp_path, "teacher"), validate.plain_candidate(other)
    summary = validate.measure_and_gate(session, candidates[0], None, candidates[1:])
    assert summary["artifacts"][0]["quality"]["kl_nats"] > 0.01
    assert summary["verdict"] == "fail"


def test_a_teacher_that_does_not_fit_is_judged_layer_by_layer_and_its_speed_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, other = (tiny_checkpoint(tmp_path, "qwen3_moe", name=f"m{seed}", seed=seed) for seed in (0, 1))
    write_gguf(other, tmp_path / "m.gguf", name="m")
    config = _real_text(tmp_path)

    class TooLarge(InstantTransport):
        def run(self, argv: object, stdin: bytes, timeout_s: float) -> Completed:
            if Path(json.loads(stdin)["path"]).suffix == ".gguf":
                return super().run(argv, stdin, timeout_s)
            return Completed(TOO_LARGE, b"", "not measured: the model does not fit into memory")

    monkeypatch.setattr(validate, "open_transport", lambda address: TooLarge())
    whole = validate.validate_artifact(tmp_path / "m.gguf", teacher, config)
    monkeypatch.setattr(hf, "fits_in_memory", lambda *given, **more: False)
    monkeypatch.setattr(hf, "load_student", lambda *given: pytest.fail("the teacher was loaded whole"))
    summary = validate.validate_artifact(tmp_path / "m.gguf", teacher, config)
    assert summary["artifacts"][0]["quality"]["kl_nats"] == pytest.approx(
        whole["artifacts"][0]["quality"]["kl_nats"], rel=1e-4
    )
    speed = summary["baseline"]["speed"]
    assert speed["decode_tokens_per_s"] is None and "not measured: the model does not fit" in speed["reason"]
    for wrong in (validate.bench_artifact, partial(validate.validate_artifact, teacher=teacher)):
        with pytest.raises(ResourceProblem, match="not measured: the model does not fit"):
            wrong(other, config=config)


def test_a_split_file_is_judged_and_hashed_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe")
    write_gguf(teacher, tmp_path / "m.gguf", name="m")
    size = (tmp_path / "m.gguf").stat().st_size
    parts = split_gguf(tmp_path / "m.gguf", 200_000)
    monkeypatch.setattr(validate, "open_transport", lambda address: InstantTransport())
    summary = validate.validate_artifact(parts[0], teacher, _real_text(tmp_path))
    artifact = Artifact(**summary["artifacts"][0])
    assert len(parts) > 1 and artifact.quality.kl_nats < 1e-4 and artifact.path == parts[0].name
    assert size <= artifact.bytes == sum(part.stat().st_size for part in parts)
    candidate = validate.plain_candidate(parts[0])
    before, raw = candidate.digest, bytearray(parts[-1].read_bytes())
    parts[-1].write_bytes(bytes([*raw[:-1], raw[-1] ^ 1]))
    assert candidate.digest != before, "another last part is another model"
    for wrong in (validate.bench_artifact, partial(validate.validate_artifact, teacher=teacher)):
        with pytest.raises(InputRejected, match="not the first part"):
            wrong(parts[-1], config=_real_text(tmp_path))


def test_bench_raises_instead_of_returning_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(8))
    with pytest.raises(InputRejected, match="could not be measured"):
        validate.bench_artifact(broken, _config())


def test_bench_returns_speed_and_memory_and_always_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = InstantTransport()
    monkeypatch.setattr(validate, "open_transport", lambda address: transport)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for _ in range(2):
        result = validate.bench_artifact(tmp_path / "x.gguf", _config(), tmp_path / "bench")
    assert transport.measured == ["x.gguf"] * 2
    assert (result["speed"]["n_runs"], result["runtime"]) == (2, "llama_cpp")
    assert json.loads((tmp_path / "bench" / "results.json").read_text()) == result
