"""The page: the verdict first, every number with its definition, and names from outside stay inert."""

from pathlib import Path
from typing import Any

from moe_edge.contracts.artifacts import DistillSummary, HeldOut, RoutingHealth
from moe_edge.contracts.plan import TriedShape
from moe_edge.contracts.report import GateResult, Judgement
from moe_edge.planning.curve import Curve, CurvePoint
from moe_edge.reporting.report_markdown import render
from tests.reporting.report_parts import DEAD, TRAINED, exported, judged, measured, planned, some_report


def page(folder: Path, judgement: Judgement | None = None, **parts: Any) -> str:
    return render(some_report(folder, judgement, **parts))


def test_the_page_says_everything_and_the_verdict_first(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert text.startswith("# PASS: demo-teacher for cpu\n\n1 of 1 gates passed. 10 of 16 experts per layer")
    for part in (
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
        "| profile | 12.3 | 500 | no |",
        "cpu Some CPU; cores 2\n\ntorch 2.13.0",
        "- measured on this host",
        "- a note of the plan",
        "moe-edge bench",
        "token ids handed to the runtime",
    ):
        assert part in text, part


def test_every_quantized_file_shows_where_its_bytes_are(tmp_path: Path) -> None:
    classes = {
        "bytes_by_class": {"attention_q": 1 << 20, "expert_down": 3 << 20},
        "bits_per_weight_by_class": {"attention_q": 6.5625, "expert_down": 5.5},
    }
    known = classes | {"fallbacks": {"Q5_K -> Q5_1": 2, "Q6_K -> F16 <b>": 1}}
    text = page(tmp_path, export=[exported(**known), exported("onnx", **classes)])
    assert text.count("| expert_down | 3.0 MiB | 75.0% | 5.50 |\n| attention_q | 1.0 MiB | 25.0% | 6.56 |") == 2
    assert text.count("got another type: Q5_K -> Q5_1 in 2 tensors, Q6_K -> F16 &lt;b> in 1 tensor.") == 1
    assert text.index("| GGUF Q4_K_M | size |") < text.index("| ONNX int4 | size |")
    assert "## Bits per tensor class" not in page(tmp_path), "where the export knows nothing of them"


def test_predictions_have_their_definition_beside_them(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "| artifacts/gguf/x | 0.3100 | 0.0200 | 0.3300 | 0.0512 | 0.0100 |" in text
    assert "| expert_down@0-1 | Q3_K |" in text
    definition = next(line for line in text.splitlines() if line.startswith("Predicted: "))
    assert "masked" in definition and "what the bits alone cost (measured on the teacher)" in definition
    assert "Achieved: KL(teacher || the file) on held-out text, after training" in definition


def test_what_was_refitted_cached_and_compared_is_said(tmp_path: Path) -> None:
    """A plan with a refit, an 8-bit cache, a chosen shape: each beside its definition."""
    shape = TriedShape(
        top_k=2,
        expert_width=64,
        experts_kept=10,
        quantization="Q4_K_M",
        masked_kl_nats=0.31,
        refitted_kl_nats=0.11,
        quantization_kl_nats=0.02,
        kl_nats=0.13,
        file_bytes=5_000_000,
        decode_tokens_per_s=12.0,
    )
    estimate = planned().estimate.model_copy(update={"kv_precision": "q8_0", "context_length": 2048})
    contexts = {"f16": 3000, "q8_0": 5000}
    plan = planned(compensate=True, shapes=[shape], largest_contexts=contexts, expert_width=64, estimate=estimate)
    device = {"label": "host", "kv_cache": "q8_0"}
    text = page(tmp_path, judged(artifacts=[measured(device=device), measured("hf")]), plan=plan)
    for part in (
        "after the refit of the down projections and training",
        "refitted, before training 0.3000",
        "2048 tokens of context in q8_0 (largest that fits: 3000 in f16, 5000 in q8_0)",
        "judged and timed with a KV cache in q8_0",
        "of 64 neurons",
        "| top-2 | 64 | 10 | Q4_K_M | 0.3100 | 0.1100 | 0.1300 |",
        "-fa on -ctk q8_0 -ctv q8_0",
    ):
        assert part in text, part


def test_the_curve_is_shown_as_a_picture_and_a_table(tmp_path: Path) -> None:
    points = tuple(CurvePoint(n, kl, (kl, 2 * kl)) for n, kl in ((16, 0.0), (12, 0.19), (10, 0.47), (8, 1.17)))
    curve = Curve("frequency", 16, 8, 1024, points).to_json(2.0)
    text = page(tmp_path, curve=curve)
    assert "![masked KL against experts kept](plan/curve.svg)" in text
    assert "| 10 | 62.5% | 0.4700 | [0.4700, 0.9400] |" in text and "At most 2.00 nats down to 8 experts" in text
    assert some_report(tmp_path).curve == curve | {
        "points": [point | {"kl_nats_ci95": list(point["kl_nats_ci95"])} for point in curve["points"]]
    }


def test_routing_health_is_compared(tmp_path: Path) -> None:
    teacher = {"load_entropy": 0.97, "dead_experts": 0}
    health = RoutingHealth(
        tokens=512,
        teacher=teacher,
        student=teacher | {"load_entropy": 0.91, "teachers_gate_mass_kept": 0.8},
        layers=[],
        alarms=["layer 3 sends <all> to one expert"],
    )
    text = page(tmp_path, routing_health=health)
    assert "| entropy of the load, 1 = even | 0.9700 | 0.9100 |" in text
    assert "| share of the teacher's gate mass that the kept experts had | n/a | 0.8000 |" in text
    assert "- Alarm: layer 3 sends &lt;all> to one expert" in text
    assert "## Routing health" not in page(tmp_path)


def test_a_failure_shows_its_reasons_on_top_and_nulls_as_not_measured(tmp_path: Path) -> None:
    gate = GateResult(
        name="decode_tokens_per_s",
        artifact="artifacts/gguf/x",
        limit=1.0,
        value=None,
        unit="tokens/s",
        direction="at least",
        passed=False,
        reason="failed:oom",
    )
    broken = measured(quality=DEAD | {"student_reason": "NaN"}, speed=DEAD, memory=DEAD)
    reasons = ["artifacts/gguf/x: no speed: failed:oom"]
    text = page(tmp_path, judged(artifacts=[broken], verdict="fail", reasons=reasons, gates=[gate]))
    assert text.startswith("# FAIL")
    assert text.index("no speed: failed:oom") < text.index("## Results")
    assert "GGUF Q4_K_M: n/a because: failed:oom: the process was killed; NaN" in text
    assert "| n/a: failed:oom | FAIL |" in text
    assert "## Gates\n\nNone is configured." in page(tmp_path, judged(gates=[], verdict="fail", reasons=reasons))


def test_a_diverged_or_absent_training_is_said(tmp_path: Path) -> None:
    diverged = TRAINED.model_copy(update={"after": HeldOut(kl_nats=float("nan"))})
    assert "| held-out KL to the teacher, nats | 0.3000 | n/a |" in page(tmp_path, distill=diverged)
    untrained = DistillSummary(trained=False, kept="untrained", reason="distill.stages is empty")
    text = page(tmp_path, distill=untrained)
    assert "## Distillation\n\ndistill.stages is empty\n\n## Parity" in text
    assert "before training n/a (held-out calibration rows)" in text


def test_hostile_names_stay_inert(tmp_path: Path) -> None:
    text = page(tmp_path, judged(notes=["<img src=x onerror=alert(1)>\n# heading"]), teacher="a/<script>|x")
    assert "<script>" not in text and "<img" not in text
    assert "\n# heading" not in text
