"""The stage: it judges by the configuration of the moment, and writes what its report says."""

import json
from pathlib import Path

from moe_edge.contracts.artifacts import ValidationFolder, ValidationSummary
from moe_edge.contracts.report import Report, StageInfo
from moe_edge.reporting.report_markdown import render
from moe_edge.stages import report
from tests.evaluation.fakes import build_config
from tests.reporting.report_parts import folders, measured


def write(folder: Path, **gates: object) -> Report:
    summary = ValidationSummary(
        artifacts=[measured(device={"kv_cache": "f16"}), measured("hf", device={})],
        baseline=measured("hf", path="teacher", device={}),
        with_student=True,
        notes=["a note of validate"],
    )
    stages = [StageInfo(name="profile", seconds=1.0, peak_rss_mib=None, cached=True)]
    validate = ValidationFolder(folder / "validate", "digest", summary)
    return report.run(build_config(dict(gates)), folder, stages, validate=validate, **folders(folder))


def test_what_is_written_is_the_report(tmp_path: Path) -> None:
    found = write(tmp_path, kl_to_teacher_nats=0.1, host_speed=True)
    assert json.loads((tmp_path / "report.json").read_text()) == found.to_dict()
    assert found.verdict == "pass" and (tmp_path / "report.md").read_text().startswith("# PASS")
    assert found.artifacts[0].device == {"kv_cache": "f16", "label": "target"}
    assert "a note of validate" in found.notes


def test_a_written_report_is_read_and_printed_as_the_build_did_and_nothing_is_written(tmp_path, called) -> None:
    write(tmp_path, kl_to_teacher_nats=0.1, host_speed=True)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    page, data = tmp_path / "report.md", tmp_path / "report.json"
    assert called("report", tmp_path)[:2] == (0, page.read_text() + "\n") == called("report", tmp_path)[:2]
    assert json.loads(called("report", tmp_path, "--json")[1]) == json.loads(data.read_text())
    assert render(Report.read(data)) == page.read_text()
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}
    page.unlink()
    assert called("report", tmp_path)[0] == 0 and not page.exists()


def test_a_report_that_is_damaged_or_not_there_is_refused(tmp_path: Path, called) -> None:
    code, out, err = called("report", tmp_path)
    assert code == 2 and out == "" and "no finished stage: profile, plan" in err
    (tmp_path / "report.json").write_text('{"schema": "moe-edge/report@1"')
    code, out, err = called("report", tmp_path)
    assert code == 4 and out == "" and "the report is damaged" in err and "Traceback" not in err


def test_other_limits_change_the_verdict_of_the_same_measurements(tmp_path: Path) -> None:
    before = write(tmp_path, kl_to_teacher_nats=0.1, host_speed=True)
    after = write(tmp_path, kl_to_teacher_nats=0.01, host_speed=False)
    assert (before.verdict, after.verdict) == ("pass", "fail")
    assert (tmp_path / "report.md").read_text().startswith("# FAIL")
    assert {artifact.device["label"] for artifact in after.artifacts} == {"host"}
    assert [row.quality for row in after.artifacts] == [row.quality for row in before.artifacts]
    assert any("are not gated" in note for note in after.notes)


def test_a_build_without_limits_is_not_a_pass(tmp_path: Path) -> None:
    assert write(tmp_path).verdict == "fail"
