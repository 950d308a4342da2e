"""Instruction sets: the untrained student of the first seed in every runtime, gates, averages, and what is refused at once."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from moe_edge.contracts.errors import ConfigError, EnvironmentProblem, InputRejected
from moe_edge.contracts.evaluation import Average
from moe_edge.evaluation import instructions
from moe_edge.evaluation.answers import Protocol
from moe_edge.evaluation.instructions import EvaluationSettings, artifact_digest, run
from moe_edge.exporting.gguf import write_gguf
from moe_edge.exporting.onnx import export_onnx
from moe_edge.metrics import text
from moe_edge.reporting.evaluation_text import evaluation_text
from moe_edge.runtimes.sampling import Sampling
from moe_edge.texts.instruction_rows import read_instruction_sets
from tests.evaluation.small_set import ROWS, silent_student, write_set
from tests.tiny import tiny_checkpoint

SHORT = Protocol(Sampling(), (10, 20), prompt_tokens=48, max_new_tokens=6)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_set(tmp_path)


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BOOTSTRAP_SAMPLES", 50)


@pytest.mark.parametrize("kind", ["hf", "gguf", "onnx"])
def test_an_untrained_student_that_says_nothing(tmp_path: Path, data: Path, kind: str) -> None:
    """Zeros instead of a division by zero, every row counted, and the gate says why it failed."""
    artifact = student = silent_student(tmp_path)
    if kind == "gguf":
        artifact = tmp_path / "untrained.gguf"
        write_gguf(student, artifact, name="untrained")
    if kind == "onnx":
        artifact = tmp_path / "onnx"
        export_onnx(student, artifact, precision="fp32")
    result = run(artifact, read_instruction_sets([data]), EvaluationSettings(SHORT), tmp_path / "out")
    assert result.to_dict() == json.loads((tmp_path / "out" / "evaluate.json").read_text())
    part = result.sets["tiny set/test"]
    assert part.counts.n == 3 and part.counts.n_answers == part.counts.n_empty == 6
    assert part.counts.statuses["empty"] == 6 and part.counts.n_truncated == 0
    assert part.counts.excluded_rows == ["tiny set/test:4"]
    for metric in part.metrics.values():
        assert metric.value == 0 and metric.ci95 == (0, 0) and metric.mean_nonempty is None
    assert set(part.categories) == {"facts", "style"} and part.categories["style"].counts.n == 1
    assert result.verdict == "fail" and "empty answers is 1" in result.reasons[0]
    assert (result.artifact.format, result.schema_, result.encoder) == (kind, "moe-edge/evaluate@1", None)
    shown = evaluation_text(result)
    assert "| tiny set/test | 3 | 0.00 [0.00, 0.00] |" in shown and "| 100.0 % |" in shown
    assert "1 rows have no reference" in shown


def test_a_talking_student_passes_and_differs_by_seed(tmp_path: Path, data: Path) -> None:
    checkpoint, out = tiny_checkpoint(tmp_path, "qwen3_moe"), tmp_path / "out"
    settings = EvaluationSettings(SHORT, batch_size=2, max_truncated_rate=1)
    result = run(checkpoint, read_instruction_sets([data]), settings, out)
    assert result.verdict == "pass" and result.artifact.format == "hf"
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and {line["run"] for line in lines} == {"10", "20"}
    assert len({line["answer"]["text"] for line in lines}) > 3
    assert result.protocol.runs == ["10", "20"] and not result.protocol.is_minillm_contract
    again = run(checkpoint, read_instruction_sets([data]), EvaluationSettings(SHORT, batch_size=3), tmp_path / "again")
    assert again.verdict == "fail" and [gate.passed for gate in again.gates] == [True, False]
    assert "the share of truncated answers is 1, limit at most 0.5" in again.reasons[0]
    assert again.sets["tiny set/test"].metrics == result.sets["tiny set/test"].metrics


@pytest.mark.parametrize("values", [{"batch_size": 0}, {"max_empty_rate": 1.5}, {"max_truncated_rate": -1}])
def test_impossible_settings(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EvaluationSettings(**values)


def test_a_folder_without_tokenizer_is_rejected(tmp_path: Path, data: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen3_moe", with_tokenizer=False)
    with pytest.raises(InputRejected, match="tokenizer"):
        run(checkpoint, read_instruction_sets([data]), EvaluationSettings(SHORT), tmp_path / "out")


def test_an_encoder_that_is_not_there_is_a_usage_error(tmp_path: Path, data: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen3_moe")
    with pytest.raises(ConfigError, match="no such BERTScore encoder"):
        run(
            checkpoint,
            read_instruction_sets([data]),
            EvaluationSettings(SHORT, bertscore=tmp_path / "none"),
            tmp_path / "out",
        )


@pytest.mark.skipif(importlib.util.find_spec("bert_score") is None, reason="the extra 'bertscore' is not installed")
def test_a_broken_encoder_is_rejected_before_the_first_answer(tmp_path: Path, data: Path) -> None:
    checkpoint, encoder = tiny_checkpoint(tmp_path, "qwen3_moe"), tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text('{"model_type": "bert"}')
    (encoder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(InputRejected, match="encoder cannot be used"):
        run(checkpoint, read_instruction_sets([data]), EvaluationSettings(SHORT, bertscore=encoder), tmp_path / "out")
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_a_missing_metric_library_is_found_before_the_first_answer(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, *_: Any) -> None:
        raise EnvironmentProblem(f"{name} is missing")

    monkeypatch.setattr(instructions, "compute", missing)
    with pytest.raises(EnvironmentProblem):
        run(
            tiny_checkpoint(tmp_path, "qwen3_moe"),
            read_instruction_sets([data]),
            EvaluationSettings(SHORT),
            tmp_path / "out",
        )
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_a_set_without_references_is_answered_and_fails_for_want_of_a_score(tmp_path: Path, data: Path) -> None:
    data.write_text(json.dumps(ROWS[3]) + "\n")
    sets, checkpoint = read_instruction_sets([data]), tiny_checkpoint(tmp_path, "qwen3_moe")
    result = run(checkpoint, sets, EvaluationSettings(SHORT, max_truncated_rate=1), tmp_path / "out")
    assert result.verdict == "fail" and result.reasons == [
        "tiny set/test: nothing was scored (no row with a reference)"
    ]
    assert result.sets["tiny set/test"].counts.n_answers == 2 and all(gate.passed for gate in result.gates)
    assert result.average["rouge_l"] == Average(value=None, reason="no value for tiny set/test")
    assert "n/a (no row with a reference)" in evaluation_text(result)
    (checkpoint / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputRejected):
        run(checkpoint, sets, EvaluationSettings(SHORT), tmp_path / "damaged")


def test_the_average_is_over_sets(tmp_path: Path, data: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "hello", "output": "你好"}) + "\n")
    result = run(
        silent_student(tmp_path),
        read_instruction_sets([data, other]),
        EvaluationSettings(SHORT, max_empty_rate=1),
        tmp_path / "o",
    )
    assert len(result.sets) == 2 and result.average["chrf"] == Average(value=0, reason=None)
    assert result.verdict == "pass" and any("read chrF" in note for note in result.notes)
    assert "| average |" in evaluation_text(result)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first = tiny_checkpoint(tmp_path, "qwen3_moe", name="a")
    second = tiny_checkpoint(tmp_path, "qwen3_moe", name="b")
    assert artifact_digest(first) == artifact_digest(second)
    (second / "generation_config.json").write_text("{}")
    assert artifact_digest(first) != artifact_digest(second)
    assert len(artifact_digest(first / "config.json")) == len("sha256:") + 64
