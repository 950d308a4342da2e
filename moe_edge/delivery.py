"""What a build leaves beside its stages: configuration, report, device bundles, and last the manifest."""

import logging
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML

from moe_edge import pipeline
from moe_edge.contracts.artifacts import (
    CompressFolder,
    DistillFolder,
    ExportFolder,
    PlanFolder,
    StageFolder,
    ValidationFolder,
)
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.manifest import Manifest, read_manifest
from moe_edge.contracts.report import Report, StageInfo
from moe_edge.storage.files import write_text_atomic
from moe_edge.storage.folders import changed_files, write_run_manifest

log = logging.getLogger(__name__)
Folder = TypeVar("Folder", bound=StageFolder[Any])


def plain(config: BuildConfig) -> dict[str, Any]:
    """The configuration as YAML and manifests hold it."""
    return config.model_dump(mode="json", by_alias=True)


def finish(state: pipeline.Build) -> Report:
    """Report, device bundles and manifest of a complete build; untouched when every stage was reused and all is still there."""
    inputs = {"teacher": state.teacher.digest} | {name: manifest.digest for name, manifest in state.manifests.items()}
    kept = read_manifest(state.out)
    unchanged = kept is not None and kept.inputs == inputs and kept.config == plain(state.config)
    if kept is not None and unchanged and all(state.cached.values()) and not changed_files(state.out, kept.files):
        return Report.read(state.out / "report.json")
    stream = StringIO()
    YAML(typ="safe").dump(plain(state.config), stream)
    write_text_atomic(state.out / "config.yaml", stream.getvalue())
    report = write_report(state.out, state.config, state.manifests, state.cached)
    exported = ExportFolder.of(state.folder("export"), state.manifests["export"])
    bundle(state.out, exported, state.config, state.teacher.digest)
    write_run_manifest(state.out, plain(state.config), inputs, pipeline.all_versions())
    return report


def write_report(
    out: Path, config: BuildConfig, manifests: Mapping[str, Manifest], reused: Mapping[str, bool]
) -> Report:
    """report.json and report.md from what all stages found; a stage's row says whether it was reused."""
    from moe_edge.stages import report

    rows = [_stage_info(name, manifest, reused[name]) for name, manifest in manifests.items()]

    def opened(kind: type[Folder]) -> Folder:
        return kind.of(out / kind.stage, manifests[kind.stage])

    return report.run(
        config,
        out,
        rows,
        plan=opened(PlanFolder),
        compress=opened(CompressFolder),
        distill=opened(DistillFolder),
        export=opened(ExportFolder),
        validate=opened(ValidationFolder),
    )


def _stage_info(name: str, manifest: Manifest, reused: bool) -> StageInfo:
    cost = manifest.cost
    seconds, peak = (cost.seconds, cost.peak_rss_mib) if cost else (0.0, None)
    return StageInfo(name=name, seconds=seconds, peak_rss_mib=peak, cached=reused)


def bundle(out: Path, exported: ExportFolder, config: BuildConfig, teacher_digest: str) -> None:
    """The device bundles of what was delivered."""
    from moe_edge.exporting.bundles import write_bundles

    for folder in write_bundles(out, exported, config, {"teacher": teacher_digest}, pipeline.all_versions()):
        log.info("device bundle: %s and %s.tar", out / folder, folder)
