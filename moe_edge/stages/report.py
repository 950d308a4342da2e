"""report: everything a build found out, as report.json (checked against its schema) and report.md (for people).

It measures nothing, but holds what was measured against the target's limits; `moe-edge report RUN` prints what it wrote.
"""

from collections.abc import Sequence
from pathlib import Path

from moe_edge.contracts.artifacts import CompressFolder, DistillFolder, ExportFolder, PlanFolder, ValidationFolder
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.report import Report, StageInfo
from moe_edge.evaluation.judgement import judge
from moe_edge.reporting.report import build_report
from moe_edge.reporting.report_markdown import render
from moe_edge.storage.files import write_json_atomic, write_text_atomic


def run(
    config: BuildConfig,
    out: Path,
    stages: Sequence[StageInfo],
    *,
    plan: PlanFolder,
    compress: CompressFolder,
    distill: DistillFolder,
    export: ExportFolder,
    validate: ValidationFolder,
) -> Report:
    """Judge what was measured; write report.json and report.md into `out`, the build's folder.

    Raises:
        ConfigError: the plan cannot be read.
    """
    judgement = judge(validate.summary, config.target)
    report = build_report(
        out, config, stages, plan=plan, compress=compress, distill=distill, export=export, judgement=judgement
    )
    write_json_atomic(out / "report.json", report.to_dict())
    written = Report.read(out / "report.json")  # what `moe-edge report` reads: the two pages are the same
    write_text_atomic(out / "report.md", render(written))
    return report
