"""report.json: its schema refuses unexplained nulls and impossible verdicts, and what was written can be read again."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from moe_edge.contracts.measurements import Measured, Memory, Quality, Speed
from moe_edge.contracts.report import GateResult, Report
from moe_edge.storage.files import write_json_atomic
from tests.reporting.report_parts import measured, planned, some_report


def test_the_json_has_what_the_contract_names(tmp_path: Path) -> None:
    data = some_report(tmp_path).to_dict()
    assert data["schema"] == "moe-edge/report@1"
    for model in ("teacher", "student"):
        assert {"params_total", "params_active", "experts", "top_k", "bytes"} <= data[model].keys()
    assert data["stages"] == [{"name": "profile", "seconds": 12.34, "peak_rss_mib": 500.0, "cached": False}]
    artifact = data["artifacts"][0]
    assert {"format", "runtime", "path", "bytes", "bits_per_weight", "device"} <= artifact.keys()
    assert {"kl_nats", "top1_agreement", "perplexity", "teacher_perplexity", "n_tokens"} <= artifact["quality"].keys()
    speed = {"ttft_ms_p50", "prefill_tokens_per_s", "decode_tokens_per_s", "decode_p95_ms", "n_runs", "cov"}
    assert speed <= artifact["speed"].keys() and "peak_rss_mib" in artifact["memory"]
    assert {"name", "limit", "value", "unit", "passed"} <= data["gates"][0].keys()
    assert data["plan"]["schema"] == "moe-edge/plan@1" and "kept" not in data["plan"]


@pytest.mark.parametrize(
    "plan",
    [
        planned(),
        planned(action="merge", merges={0: {1: 3}}),
        planned(uneven=True, experts_kept=2, kept={0: [3], 1: [1, 2, 3]}),
    ],
    ids=["drop", "merge", "uneven"],
)
def test_a_written_report_can_be_read_again_without_the_expert_lists(tmp_path: Path, plan: object) -> None:
    report = some_report(tmp_path, plan=plan)
    write_json_atomic(tmp_path / "report.json", report.to_dict())
    again = Report.read(tmp_path / "report.json")
    assert again.plan is not None and report.plan is not None
    assert again.plan.model_dump(exclude={"kept", "merges"}) == report.plan.model_dump(exclude={"kept", "merges"})
    assert again.model_copy(update={"plan": None}) == report.model_copy(update={"plan": None})
    assert again.plan.kept == {}


@pytest.mark.parametrize("kind", [Quality, Speed, Memory])
def test_a_null_without_a_reason_is_refused(kind: type[Measured]) -> None:
    with pytest.raises(ValidationError, match="null without a reason"):
        kind()
    assert kind(reason="because").reason == "because"


def test_impossible_reports_are_refused(tmp_path: Path) -> None:
    data = some_report(tmp_path).to_dict()
    with pytest.raises(ValidationError, match="a pass needs gates"):
        Report.model_validate(data | {"gates": []})
    with pytest.raises(ValidationError, match="a fail needs a reason"):
        Report.model_validate(data | {"verdict": "fail"})
    with pytest.raises(ValidationError):
        Report.model_validate(data | {"surprise": 1})
    with pytest.raises(ValidationError, match="cannot pass"):
        GateResult.model_validate(data["gates"][0] | {"value": None})
    with pytest.raises(ValidationError):
        Quality.model_validate(measured().quality.model_dump() | {"kl_nats": float("nan")})
