"""What a report says beyond its stages: bits, classes, predictions, commands; and that what JSON cannot hold becomes null."""

from pathlib import Path

import pytest

from moe_edge.contracts.artifacts import DistillSummary, HeldOut
from moe_edge.contracts.report import Report
from tests.reporting.report_parts import DEAD, TRAINED, exported, judged, measured, planned, some_report

SAME = {"experts_kept": 4, "experts_total": 4, "kept": {0: [0, 1, 2, 3]}, "predicted_kl_nats": None}


def test_every_stage_is_in_it(tmp_path: Path) -> None:
    report = some_report(tmp_path)
    assert (report.verdict, report.target, report.stages[0].seconds) == ("pass", "cpu", 12.34)
    assert (report.teacher.experts, report.student.experts) == (16, 10)
    assert report.plan == planned() and report.distillation == TRAINED
    assert [row["artifact"] for row in report.parity] == ["gguf F16", "gguf F16 against onnx fp32"]
    assert report.notes == ["a note of the plan", "a note", "a note of export", "measured on this host"]
    assert report.curve is None and report.routing_health is None
    assert report.definitions.keys() >= {"kl_nats", "decode_tokens_per_s", "peak_rss_mib", "bits_per_weight"}


def test_the_teacher_has_its_folders_name(tmp_path: Path) -> None:
    assert some_report(tmp_path).teacher.model_dump()["name"] == "demo-teacher"
    assert some_report(tmp_path, teacher="models/some-teacher").teacher.model_dump()["name"] == "some-teacher"


def test_checkpoints_get_bits_per_weight_and_files_their_classes(tmp_path: Path) -> None:
    classes = {
        "bytes_by_class": {"attention_q": 1 << 20, "expert_down": 3 << 20},
        "bits_per_weight_by_class": {"attention_q": 6.5625, "expert_down": 5.5},
        "fallbacks": {"Q5_K -> Q5_1": 2},
    }
    report = some_report(tmp_path, export=[exported(**classes), exported("onnx")])
    gguf, onnx, student = report.artifacts
    assert {name: getattr(gguf, name) for name in classes} == classes
    assert onnx.fallbacks == {} == student.bytes_by_class
    assert report.baseline is not None
    bits = (gguf.bits_per_weight, student.bits_per_weight, report.baseline.bits_per_weight)
    assert bits == (4.8, 5.0, 3.636), "8 * 5e6 bytes / 8e6 and 11e6 parameters"


def test_predictions_stand_beside_what_was_achieved(tmp_path: Path) -> None:
    gguf, onnx = some_report(tmp_path).predictions
    assert (gguf.masked_kl_nats, gguf.quantization_kl_nats, gguf.kl_nats) == (0.31, 0.02, pytest.approx(0.33))
    assert (gguf.achieved_kl_nats, gguf.achieved_quantization_kl_nats) == (0.0512, 0.01)
    assert onnx.kl_nats is None and "no prediction for onnx int4" in str(onnx.reason)


def test_only_a_student_that_computes_the_same_has_no_masked_cost(tmp_path: Path) -> None:
    (unpruned, _) = some_report(tmp_path, plan=planned(**SAME)).predictions
    assert unpruned.masked_kl_nats == 0.0 and unpruned.kl_nats == 0.02 and unpruned.reason is None
    (dense, _) = some_report(tmp_path, plan=planned(**SAME, action="dense")).predictions
    assert dense.masked_kl_nats is None and "no masked KL" in str(dense.reason)


def test_a_failed_artifact_has_a_reason_instead_of_a_prediction(tmp_path: Path) -> None:
    plan = planned(predicted_kl_nats=None, quantization_kl_nats={})
    judgement = judged(artifacts=[measured(quality=DEAD)])
    (row,) = some_report(tmp_path, judgement, plan=plan).predictions
    assert row.kl_nats is None and "failed:oom" in str(row.reason) and "no masked KL" in str(row.reason)


def test_a_diverged_training_is_null_in_it(tmp_path: Path) -> None:
    diverged = HeldOut(kl_nats=float("nan"), cka_mean=float("inf"), cka_by_layer=[float("nan"), 0.9])
    report = some_report(tmp_path, distill=TRAINED.model_copy(update={"after": diverged}))
    assert report.distillation is not None
    assert report.distillation.after == HeldOut(cka_by_layer=[None, 0.9])
    assert report.distillation.before == TRAINED.before
    assert Report.model_validate(report.to_dict()).distillation == report.distillation


def test_the_next_commands_run_the_main_file_as_planned(tmp_path: Path) -> None:
    artifacts = [measured("onnx"), measured(), measured(path="artifacts/gguf/y")]
    plan, path = planned(), tmp_path / "artifacts/gguf/x"
    estimate = plan.estimate.model_copy(update={"kv_precision": "q8_0", "context_length": 4096})
    report = some_report(tmp_path, judged(artifacts=artifacts), plan=plan.model_copy(update={"estimate": estimate}))
    assert report.next_commands == [
        f"moe-edge bench {path} --set target.runtime.kv_cache=q8_0",
        f"llama-cli -m {path} -c 4096 -fa on -ctk q8_0 -ctv q8_0",
        f"moe-edge verify {tmp_path}",
    ]
    failed = some_report(tmp_path, judged(verdict="fail", reasons=["so"])).next_commands
    assert failed[:2] == [f"moe-edge bench {path}", f"llama-cli -m {path}"]
    assert "plan.bits" in failed[2] and "distill.tokens" in failed[3] and "verify" in failed[4]
    assert len(some_report(tmp_path, judged(artifacts=[measured("hf")])).next_commands) == 1


def test_an_untrained_student_is_reported(tmp_path: Path) -> None:
    untrained = DistillSummary(trained=False, kept="untrained", reason="distill.stages is empty")
    assert some_report(tmp_path, distill=untrained).distillation == untrained
