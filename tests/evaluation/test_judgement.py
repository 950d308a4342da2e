"""Gates: limits, directions, nulls, when a verdict is a pass; and that a judgement depends on the limits alone."""

import pytest

from moe_edge.contracts.artifacts import ValidationSummary
from moe_edge.contracts.measurements import Artifact
from moe_edge.contracts.report import Judgement
from moe_edge.contracts.target import Gates
from moe_edge.contracts.targets_io import load_target
from moe_edge.evaluation.judgement import GATES, apply_gates, gated, judge, verdict


def _artifact(name: str = "a.gguf", **changes: object) -> Artifact:
    row: dict[str, object] = {
        "format": "gguf",
        "runtime": "llama_cpp",
        "quantization": "Q4_K_M",
        "path": name,
        "bytes": 400,
        "bits_per_weight": 4.5,
        "quality": {
            "kl_nats": 0.1,
            "kl_to_student_nats": 0.05,
            "top1_agreement": 0.8,
            "perplexity": 12.0,
            "teacher_perplexity": 10.0,
            "n_tokens": 100,
        },
        "speed": {
            "ttft_ms_p50": 5.0,
            "prefill_tokens_per_s": 50.0,
            "decode_tokens_per_s": 20.0,
            "decode_p95_ms": 60.0,
            "n_runs": 5,
            "cov": 0.01,
        },
        "memory": {"peak_rss_mib": 100.0},
        "device": {},
    }
    return Artifact.model_validate(row | changes)


ALL = Gates(
    kl_to_student_nats=0.05,
    kl_to_teacher_nats=0.1,
    top1_agreement_to_teacher=0.8,
    perplexity_ratio=1.2,
    bytes_ratio=0.4,
    decode_tokens_per_s=20,
    host_speed=True,
)


def test_every_limit_of_the_target_has_a_row() -> None:
    assert set(GATES) == set(Gates.model_fields) - {"host_speed"}


def test_a_value_on_its_limit_passes() -> None:
    results = apply_gates(ALL, [_artifact()], teacher_bytes=1000)
    assert {result.name for result in results} == set(GATES)
    assert all(result.passed for result in results)
    assert verdict(results, [_artifact()]) == ("pass", [])


@pytest.mark.parametrize(
    ("gate", "limit", "value"),
    [
        ("kl_to_student_nats", 0.04, 0.05),
        ("kl_to_teacher_nats", 0.09, 0.1),
        ("top1_agreement_to_teacher", 0.81, 0.8),
        ("perplexity_ratio", 1.19, 1.2),
        ("bytes_ratio", 0.39, 0.4),
        ("decode_tokens_per_s", 21, 20),
    ],
)
def test_a_value_beyond_its_limit_fails_and_is_named(gate: str, limit: float, value: float) -> None:
    (result,) = apply_gates(Gates(**{gate: limit}), [_artifact()], teacher_bytes=1000)
    assert (result.name, result.value, result.passed) == (gate, value, False)
    outcome, (reason,) = verdict([result], [_artifact()])
    assert outcome == "fail"
    assert gate in reason and "a.gguf" in reason


def test_a_null_value_under_a_limit_fails_with_its_reason() -> None:
    broken = _artifact(quality={"reason": "NaN", "student_reason": "NaN"})
    results = apply_gates(ALL, [broken], teacher_bytes=0)
    failed = {result.name: result.reason for result in results if not result.passed}
    assert failed == {
        "kl_to_student_nats": "NaN",
        "kl_to_teacher_nats": "NaN",
        "top1_agreement_to_teacher": "NaN",
        "perplexity_ratio": "NaN",
        "bytes_ratio": "the teacher's size is unknown",
    }


def test_no_gates_is_not_a_pass() -> None:
    outcome, reasons = verdict(apply_gates(Gates(), [_artifact()], 1000), [_artifact()])
    assert outcome == "fail"
    assert "no gate" in reasons[0]


def test_an_artifact_without_numbers_fails_although_its_gates_are_absent() -> None:
    dead = _artifact("b.gguf", speed={"reason": "failed:oom: killed"})
    results = apply_gates(Gates(kl_to_teacher_nats=1), [_artifact(), dead], 1000)
    outcome, reasons = verdict(results, [_artifact(), dead])
    assert outcome == "fail"
    assert reasons == ["b.gguf: no speed: failed:oom: killed"]


def test_quantized_files_are_gated_others_only_when_alone() -> None:
    full = _artifact("f16.gguf", quantization="F16")
    hf = _artifact("hf", format="hf", runtime="hf", quantization=None)
    quantized = _artifact()
    assert gated([full, quantized, hf]) == [quantized]
    assert gated([full, hf]) == [full]
    assert gated([hf]) == [hf]


def test_gates_can_be_left_out() -> None:
    results = apply_gates(ALL, [_artifact()], 1000, without=["decode_tokens_per_s", "kl_to_student_nats"])
    assert {result.name for result in results} == set(GATES) - {"decode_tokens_per_s", "kl_to_student_nats"}


HF = {"format": "hf", "runtime": "hf", "quantization": None}
NO_STUDENT = {"kl_nats": 0.1, "top1_agreement": 0.8, "perplexity": 12.0, "teacher_perplexity": 10.0}


def judged(gates: Gates, *artifacts: Artifact, with_student: bool = True) -> Judgement:
    found = ValidationSummary(
        artifacts=list(artifacts),
        baseline=_artifact("teacher", bytes=1000, **HF),
        with_student=with_student,
        notes=["measured"],
        machine={"cores": 2},
        versions={"torch": "2"},
    )
    before = found.model_dump()
    judgement = judge(found, load_target("cpu").model_copy(update={"gates": gates}))
    assert found.model_dump() == before, "what was measured stays as it is"
    return judgement


def test_a_judgement_is_what_was_measured_and_what_that_means() -> None:
    judgement = judged(ALL, _artifact(), _artifact("artifacts/hf", **HF))
    assert (judgement.verdict, judgement.reasons, judgement.notes) == ("pass", [], ["measured"])
    assert {gate.artifact for gate in judgement.gates} == {"a.gguf"} and len(judgement.gates) == len(GATES)
    assert (judgement.machine, judgement.versions, judgement.baseline.bytes) == ({"cores": 2}, {"torch": "2"}, 1000)
    assert {row.device["label"] for row in (*judgement.artifacts, judgement.baseline)} == {"target"}
    strict = judged(ALL.model_copy(update={"kl_to_teacher_nats": 0.05}), _artifact(), _artifact("artifacts/hf", **HF))
    assert strict.verdict == "fail" and strict.artifacts == judgement.artifacts
    assert strict.reasons == ["a.gguf: kl_to_teacher_nats is 0.1, limit at most 0.05 nats/token"]


def test_the_hosts_speed_is_labelled_and_not_gated_for_another_device() -> None:
    limits = Gates(kl_to_teacher_nats=1.0, decode_tokens_per_s=1e9, host_speed=False)
    judgement = judged(limits, _artifact())
    assert judgement.verdict == "pass" and [gate.name for gate in judgement.gates] == ["kl_to_teacher_nats"]
    assert {row.device["label"] for row in (*judgement.artifacts, judgement.baseline)} == {"host"}
    assert any("not on the target 'cpu', and are not gated" in note for note in judgement.notes)


def test_a_build_without_exports_is_gated_on_its_student() -> None:
    """export.formats=[]: the student is its own reference, so what export may cost is not gated."""
    judgement = judged(ALL, _artifact("artifacts/hf", quality=NO_STUDENT | {"student_reason": "itself"}, **HF))
    assert judgement.verdict == "pass" and {gate.artifact for gate in judgement.gates} == {"artifacts/hf"}
    assert "kl_to_student_nats" not in {gate.name for gate in judgement.gates}


def test_without_a_student_its_gate_is_left_out_and_that_is_said() -> None:
    alone = _artifact(quality=NO_STUDENT | {"student_reason": "none is known"})
    judgement = judged(ALL, alone, with_student=False)
    assert judgement.verdict == "pass" and "kl_to_student_nats" not in {gate.name for gate in judgement.gates}
    assert any("kl_to_student_nats was left out" in note for note in judgement.notes)
    other = Gates(kl_to_teacher_nats=1, host_speed=True)
    assert judged(other, alone, with_student=False).notes == ["measured"], "it is not configured"
    assert judged(ALL, alone).verdict == "fail", "with a student, its KL must have been measured"


def test_one_bad_artifact_fails_the_verdict_by_name() -> None:
    bad = _artifact("bad.gguf", quality=NO_STUDENT | {"kl_to_student_nats": 3.0, "kl_nats": 2.0})
    judgement = judged(ALL, _artifact(), bad)
    assert judgement.verdict == "fail"
    assert judgement.reasons and all(reason.startswith("bad.gguf") for reason in judgement.reasons)


def test_no_limits_are_not_a_pass() -> None:
    judgement = judged(Gates(), _artifact())
    assert judgement.verdict == "fail" and "no gate is configured" in judgement.reasons[0]
