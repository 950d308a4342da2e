"""The report: its schema refuses unexplained nulls, the page leads with the verdict and stays inert."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.plan import Candidate, Estimate, Plan, TriedShape
from moe_edge.contracts.report import Artifact, GateResult, Memory, Quality, Report, Speed
from moe_edge.contracts.targets_io import load_target
from moe_edge.planning.curve import Curve, CurvePoint
from moe_edge.reporting.report_markdown import inert, number, table
from moe_edge.stages.report import predictions, write_report

QUALITY = {
    "kl_nats": 0.0512,
    "kl_nats_ci95": [0.04, 0.06],
    "kl_to_student_nats": 0.01,
    "top1_agreement": 0.91,
    "perplexity": 12.0,
    "teacher_perplexity": 11.0,
    "n_tokens": 4088,
}
SPEED = {
    "ttft_ms_p50": 12.5,
    "prefill_tokens_per_s": 900.0,
    "decode_tokens_per_s": 123.4,
    "decode_p95_ms": 9.0,
    "n_runs": 5,
    "cov": 0.02,
    "n_intervals": 315,
}
DEAD = {"reason": "failed:oom: the process was killed"}


def _artifact(kind: str = "gguf", **changes: Any) -> dict[str, Any]:
    runtime = {"gguf": "llama_cpp", "onnx": "ort", "hf": "hf"}[kind]
    quantization = {"gguf": "Q4_K_M", "onnx": "int4", "hf": None}[kind]
    return {
        "format": kind,
        "runtime": runtime,
        "quantization": quantization,
        "path": f"artifacts/{kind}/x",
        "bytes": 5_000_000,
        "bits_per_weight": None if kind == "hf" else 4.8,
        "quality": QUALITY,
        "speed": SPEED,
        "memory": {"peak_rss_mib": 210.0},
        "device": {"label": "host"},
    } | changes


def _summaries(**validate: Any) -> dict[str, dict[str, Any]]:
    gate = {
        "name": "kl_to_teacher_nats",
        "artifact": "artifacts/gguf/x",
        "limit": 0.15,
        "value": 0.0512,
        "unit": "nats/token",
        "direction": "at most",
        "passed": True,
    }
    student = {"params_total": 8_000_000, "params_active": 3_000_000, "experts": 10, "top_k": 4, "bytes": 16_000_000}
    return {
        "compress": student | {"teacher": student | {"params_total": 11_000_000, "experts": 16, "bytes": 22_000_000}},
        "distill": {
            "trained": True,
            "kept": "trained",
            "reason": "held-out KL fell",
            "tokens_trained": 65536,
            "held_out_tokens": 4096,
            "held_out_kl": "cached top-32",
            "cka": "debiased linear CKA",
            "before": {"kl_nats": 0.3, "cka_mean": 0.9, "cka_by_layer": [0.9]},
            "after": {"kl_nats": 0.06, "cka_mean": 0.97, "cka_by_layer": [0.97]},
            "stages": [{"stage": "experts", "teacher": "live", "first_and_last": {"total_loss": [2.5, 2.1]}}],
            "notes": ["a note of distill"],
        },
        "export": {
            "artifacts": [],
            "parity": [
                {
                    "artifact": "gguf F16",
                    "max_abs_logit": 0.01,
                    "kl_nats": 1e-6,
                    "top1_agreement": 1.0,
                    "greedy_equal": 16,
                    "greedy_compared": 16,
                    "clear_tokens": 240,
                    "n_tokens": 256,
                    "perplexity": 12.5,
                    "student_perplexity": 12.4,
                    "tokenizer": {"tokens": 9, "equal": True, "text_returns": True},
                    "rule": "logits and KL",
                    "passed": True,
                },
                {
                    "artifact": "gguf F16 against onnx fp32",
                    "pair": ["gguf F16", "onnx fp32"],
                    "kl_nats": 2e-6,
                    "limit_kl_nats": 0.01,
                    "top1_agreement": 1.0,
                    "passed": True,
                },
            ],
        },
        "validate": {
            "artifacts": [_artifact(), _artifact("onnx"), _artifact("hf")],
            "baseline": _artifact("hf", path="teacher"),
            "gates": [gate],
            "verdict": "pass",
            "reasons": [],
            "notes": ["measured on this host"],
            "machine": {"cpu": "Some CPU", "cores": 2, "governor": None},
            "versions": {"torch": "2.13.0"},
        }
        | validate,
    }


def _plan(folder: Path) -> None:
    estimate = Estimate(
        params_total=8_000_000,
        params_active=3_000_000,
        file_bytes=5_100_000,
        kv_cache_bytes=10,
        peak_memory_bytes=9_000_000,
        decode_tokens_per_s=None,
        routed_expert_share_kept=0.625,
    )
    plan = Plan(
        criterion="frequency",
        experts_total=16,
        experts_kept=1,
        top_k=1,
        kept={0: [3]},
        quantization="Q4_K_M",
        onnx_precision="int4",
        predicted_kl_nats=0.31,
        quantization_by_class={"expert_down@0-1": "Q3_K"},
        quantization_kl_nats={"Q4_K_M": 0.02},
        quantization_kl_source="measured",
        estimate=estimate,
        competitor="quantizing harder lost by 0.1 nats",
        candidates=[
            Candidate(criterion=name, kl_nats=kl, n_tokens=4096) for name, kl in (("frequency", 0.31), ("random", 0.9))
        ],
    )
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(plan.to_json())
    points = tuple(CurvePoint(n, kl, (kl, 2 * kl)) for n, kl in ((16, 0.0), (12, 0.19), (10, 0.47), (8, 1.17)))
    curve = Curve("frequency", 16, 8, 1024, points)
    (folder / "curve.json").write_text(json.dumps(curve.to_json(2.0)))


def _write(
    tmp_path: Path, summaries: dict[str, dict[str, Any]], teacher: str | None = None
) -> tuple[dict[str, Any], str]:
    config = BuildConfig.model_validate(
        {"target": load_target("cpu").model_dump(by_alias=True), "teacher": {"path": teacher}}
    )
    stages = [{"name": "profile", "seconds": 12.34, "peak_rss_mib": 500.0, "cached": False}]
    data = write_report(tmp_path, stages, config, summaries)
    assert json.loads((tmp_path / "report.json").read_text()) == data
    Report.model_validate(data)
    return data, (tmp_path / "report.md").read_text()


def test_the_json_has_what_the_contract_names(tmp_path: Path) -> None:
    _plan(tmp_path / "plan")
    data, _ = _write(tmp_path, _summaries())
    assert data["schema"] == "moe-edge/report@1"
    for model in ("teacher", "student"):
        assert {"params_total", "params_active", "experts", "top_k", "bytes"} <= data[model].keys()
    assert data["stages"] == [{"name": "profile", "seconds": 12.34, "peak_rss_mib": 500.0, "cached": False}]
    artifact = data["artifacts"][0]
    assert {
        "format",
        "runtime",
        "path",
        "bytes",
        "bits_per_weight",
        "quality",
        "speed",
        "memory",
        "device",
    } <= artifact.keys()
    assert {"kl_nats", "top1_agreement", "perplexity", "teacher_perplexity", "n_tokens"} <= artifact["quality"].keys()
    assert {"ttft_ms_p50", "prefill_tokens_per_s", "decode_tokens_per_s", "decode_p95_ms", "n_runs", "cov"} <= artifact[
        "speed"
    ].keys()
    assert {"name", "limit", "value", "unit", "passed"} <= data["gates"][0].keys()
    assert data["verdict"] == "pass"
    assert "kept" not in data["plan"]
    assert data["artifacts"][2]["bits_per_weight"] == 5.0  # 8 * 5e6 bytes / 8e6 parameters


def test_the_page_says_everything_and_the_verdict_first(tmp_path: Path) -> None:
    _plan(tmp_path / "plan")
    _, page = _write(tmp_path, _summaries())
    assert page.startswith("# PASS: demo teacher for cpu\n\n1 of 1 gates passed. 10 of 16 experts per layer")
    for text in (
        "| teacher (transformers fp32) |",
        "| student (transformers fp32) |",
        "| GGUF Q4_K_M |",
        "| ONNX int4 |",
        "0.0512 [0.0400, 0.0600]",
        "**frequency** (chosen)",
        "| random |",
        "quantizing harder lost",
        "predicted before any change 0.3100, before training 0.3000 (held-out calibration rows), "
        "of the student 0.0512 (held-out text)",
        "| teacher-student CKA, mean over layers | 0.9000 | 0.9700 |",
        "| experts: total loss | 2.50 | 2.10 |",
        "65536 tokens trained (logits of the teacher: experts live); the trained student went on",
        "| gguf F16 |",
        "16/16",
        "| 240/256 |",
        "12.5 (12.4) | 16/16 | same | pass (logits and KL) |",
        "| gguf F16 against onnx fp32 | 2.00e-06 | 0.0100 | 1.00 | pass |",
        "Some CPU",
        "torch 2.13.0",
        "measured on this host",
        "a note of distill",
        "moe-edge bench",
        "token ids handed to the runtime",
    ):
        assert text in page, text


def test_every_quantized_file_shows_where_its_bytes_are(tmp_path: Path) -> None:
    summaries = _summaries()
    classes = {
        "bytes_by_class": {"attention_q": 1 << 20, "expert_down": 3 << 20},
        "bits_per_weight_by_class": {"attention_q": 6.5625, "expert_down": 5.5},
    }
    told = classes | {"fallbacks": {"Q5_K -> Q5_1": 2, "Q6_K -> F16 <b>": 1}}
    summaries["export"]["artifacts"] = [{"path": "artifacts/gguf/x"} | told, {"path": "artifacts/onnx/x"} | classes]
    data, page = _write(tmp_path, summaries)
    gguf, onnx, student = data["artifacts"]
    assert {name: gguf[name] for name in told} == told and onnx["fallbacks"] == {} == student["bytes_by_class"]
    assert page.count("| expert_down | 3.0 MiB | 75.0% | 5.50 |\n| attention_q | 1.0 MiB | 25.0% | 6.56 |") == 2
    assert page.count("got another type: Q5_K -> Q5_1 in 2 tensors, Q6_K -> F16 &lt;b> in 1 tensor.") == 1
    assert page.index("| GGUF Q4_K_M | size |") < page.index("| ONNX int4 | size |")
    assert "## Bits per tensor class" not in _write(tmp_path, _summaries())[1], "an older export told nothing"


def test_predictions_stand_beside_what_was_achieved(tmp_path: Path) -> None:
    _plan(tmp_path / "plan")
    data, page = _write(tmp_path, _summaries())
    gguf, onnx = data["predictions"]
    assert (gguf["masked_kl_nats"], gguf["quantization_kl_nats"], gguf["kl_nats"]) == (0.31, 0.02, pytest.approx(0.33))
    assert (gguf["achieved_kl_nats"], gguf["achieved_quantization_kl_nats"]) == (0.0512, 0.01)
    assert onnx["kl_nats"] is None and "no prediction for onnx int4" in onnx["reason"]
    assert "| artifacts/gguf/x | 0.3100 | 0.0200 | 0.3300 | 0.0512 | 0.0100 |" in page
    assert "| expert_down@0-1 | Q3_K |" in page
    definition = next(line for line in page.splitlines() if line.startswith("Predicted: "))
    assert "masked" in definition and "what the bits alone cost (measured on the teacher)" in definition
    assert "Achieved: KL(teacher || the file) on held-out text, after training" in definition


def test_what_was_refitted_cached_and_compared_is_said(tmp_path: Path) -> None:
    """A plan with a refit, an 8-bit cache, a chosen shape: each beside its definition."""
    _plan(tmp_path / "plan")
    path = tmp_path / "plan" / "plan.json"
    plan = Plan.read(path)
    shape = TriedShape(
        top_k=2, expert_width=64, experts_kept=10, quantization="Q4_K_M", masked_kl_nats=0.31,
        refitted_kl_nats=0.11, quantization_kl_nats=0.02, kl_nats=0.13, file_bytes=5_000_000, decode_tokens_per_s=12.0,
    )  # fmt: skip
    changed = {
        "compensate": True,
        "shapes": [shape],
        "largest_contexts": {"f16": 3000, "q8_0": 5000},
        "expert_width": 64,
    }
    estimate = plan.estimate.model_copy(update={"kv_precision": "q8_0", "context_length": 2048})
    path.write_text(plan.model_copy(update=changed | {"estimate": estimate}).to_json())
    device = {"label": "host", "kv_cache": "q8_0"}
    _, page = _write(tmp_path, _summaries(artifacts=[_artifact(device=device), _artifact("hf")]))
    for text in (
        "after the refit of the down projections and training",
        "refitted, before training 0.3000",
        "2048 tokens of context in q8_0 (largest that fits: 3000 in f16, 5000 in q8_0)",
        "judged and timed with a KV cache in q8_0",
        "of 64 neurons",
        "| top-2 | 64 | 10 | Q4_K_M | 0.3100 | 0.1100 | 0.1300 |",
        "-fa on -ctk q8_0 -ctv q8_0",
    ):
        assert text in page, text


def test_only_a_student_that_computes_the_same_has_no_masked_cost() -> None:
    plan = {"predicted_kl_nats": None, "experts_kept": 4, "experts_total": 4, "quantization_kl_source": "prior"}
    (row,) = predictions(
        plan | {"action": "dense", "quantization_kl_nats": {"Q4_K_M": 0.02}}, [Artifact(**_artifact())]
    )
    assert row.masked_kl_nats is None and "no masked KL" in (row.reason or "")


def test_an_unpruned_student_has_no_masked_cost_and_a_failed_one_a_reason(tmp_path: Path) -> None:
    plan = {"predicted_kl_nats": None, "experts_kept": 4, "experts_total": 4, "quantization_kl_source": "prior"}
    plan["action"] = "drop"
    artifact = Artifact(**_artifact())
    (row,) = predictions(plan | {"quantization_kl_nats": {"Q4_K_M": 0.02}}, [artifact])
    assert row.masked_kl_nats == 0.0 and row.kl_nats == 0.02 and row.reason is None
    (row,) = predictions(plan | {"experts_kept": 2, "quantization_kl_nats": {}}, [Artifact(**_artifact(quality=DEAD))])
    assert row.kl_nats is None and "failed:oom" in row.reason and "no masked KL" in row.reason
    assert predictions(None, [artifact]) == []


def test_the_curve_is_shown_as_a_picture_and_a_table(tmp_path: Path) -> None:
    _plan(tmp_path / "plan")
    data, page = _write(tmp_path, _summaries())
    assert data["curve"]["fewest_safe_experts"] == 8
    assert "![masked KL against experts kept](plan/curve.svg)" in page
    assert "| 10 | 62.5% | 0.4700 | [0.4700, 0.9400] |" in page and "At most 2.00 nats down to 8 experts" in page


def test_routing_health_is_compared(tmp_path: Path) -> None:
    summaries = _summaries()
    health = {"load_entropy": 0.97, "dead_experts": 0}
    summaries["compress"]["routing_health"] = {
        "tokens": 512, "teacher": health, "student": health | {"load_entropy": 0.91, "teachers_gate_mass_kept": 0.8},
        "layers": [], "alarms": ["layer 3 sends <all> to one expert"],
    }  # fmt: skip
    data, page = _write(tmp_path, summaries)
    assert data["routing_health"]["student"]["load_entropy"] == 0.91 and "routing_health" not in data["student"]
    assert "| entropy of the load, 1 = even | 0.9700 | 0.9100 |" in page
    assert "| share of the teacher's gate mass that the kept experts had | n/a | 0.8000 |" in page
    assert "- Alarm: layer 3 sends &lt;all> to one expert" in page
    assert "## Routing health" not in _write(tmp_path, _summaries())[1]


def test_a_failure_shows_its_reasons_on_top_and_nulls_as_not_measured(tmp_path: Path) -> None:
    reasons = ["artifacts/gguf/x: no speed: failed:oom"]
    gate = {
        "name": "decode_tokens_per_s",
        "artifact": "artifacts/gguf/x",
        "limit": 1.0,
        "value": None,
        "unit": "tokens/s",
        "direction": "at least",
        "passed": False,
        "reason": "failed:oom",
    }
    broken = _artifact(quality=DEAD | {"student_reason": "NaN"}, speed=DEAD, memory=DEAD)
    data, page = _write(tmp_path, _summaries(artifacts=[broken], verdict="fail", reasons=reasons, gates=[gate]))
    assert data["artifacts"][0]["speed"]["decode_tokens_per_s"] is None
    assert page.startswith("# FAIL")
    assert page.index("no speed: failed:oom") < page.index("## Results")
    assert "GGUF Q4_K_M: n/a because: failed:oom: the process was killed; NaN" in page
    assert "| n/a: failed:oom | FAIL |" in page


def test_a_build_without_validation_is_not_a_pass(tmp_path: Path) -> None:
    summaries = _summaries()
    del summaries["validate"], summaries["distill"]
    data, page = _write(tmp_path, summaries)
    assert data["verdict"] == "fail"
    assert "validate has not run" in page


def test_a_diverged_or_absent_training_is_said(tmp_path: Path) -> None:
    summaries = _summaries()
    summaries["distill"]["after"] = {"kl_nats": float("nan"), "cka_mean": None, "cka_by_layer": None}
    data, page = _write(tmp_path, summaries)
    assert data["distillation"]["after"]["kl_nats"] is None
    assert "| held-out KL to the teacher, nats | 0.3000 | n/a |" in page
    summaries["distill"] = {
        "trained": False,
        "kept": "untrained",
        "reason": "distill.stages is empty",
        "tokens_trained": 0,
    }
    assert "distill.stages is empty" in _write(tmp_path, summaries)[1]


def test_hostile_names_stay_inert(tmp_path: Path) -> None:
    _, page = _write(tmp_path, _summaries(notes=["<img src=x onerror=alert(1)>\n# heading"]), teacher="a/<script>|x")
    assert "<script>" not in page and "<img" not in page
    assert "\n# heading" not in page
    assert inert("a|b\nc") == "a\\|b c"
    assert table(("a", "b"), [("x|y", 1)]).count("\n") == 2


@pytest.mark.parametrize("model", [Quality, Speed, Memory])
def test_a_null_without_a_reason_is_refused(model: type) -> None:
    with pytest.raises(ValidationError, match="null without a reason"):
        model()
    assert model(reason="because").reason == "because"


def test_impossible_reports_are_refused(tmp_path: Path) -> None:
    data, _ = _write(tmp_path, _summaries())
    with pytest.raises(ValidationError, match="a pass needs gates"):
        Report.model_validate(data | {"gates": []})
    with pytest.raises(ValidationError, match="a fail needs a reason"):
        Report.model_validate(data | {"verdict": "fail"})
    with pytest.raises(ValidationError):
        Report.model_validate(data | {"surprise": 1})
    with pytest.raises(ValidationError, match="cannot pass"):
        GateResult.model_validate(data["gates"][0] | {"value": None})
    with pytest.raises(ValidationError):
        Quality.model_validate(QUALITY | {"kl_nats": float("nan")})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (0.0, "0.0000"),
        (0.05123, "0.0512"),
        (12.345, "12.3"),
        (1234.5, "1234"),
        (1e-6, "1.00e-06"),
        (-0.5, "-0.5000"),
    ],
)
def test_numbers_are_readable(value: float | None, text: str) -> None:
    assert number(value) == text
