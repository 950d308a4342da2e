"""One build from the user's words to a verdict: settle the configuration, refuse early, run the pipeline, write the report.

The command line is a thin layer over these functions; a notebook can call them too.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from moe_edge import pipeline
from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.config_io import read_yaml, resolve_config
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.manifest import MANIFEST_NAME, Manifest, read_manifest
from moe_edge.contracts.targets_io import read_target
from moe_edge.storage.checkpoint import checkpoint_digest, inspect_checkpoint
from moe_edge.storage.delivery import deliver, write_run_manifest
from moe_edge.storage.files import sha256_file, write_text_atomic
from moe_edge.storage.folders import changed_files

log = logging.getLogger(__name__)
# What a build up to a stage may write, as a multiple of the teacher's bytes; the rest of the build is the whole's share.
DISK_SHARES = {"profile": 0.1, "plan": 0.1, "compress": 1.5}
WHOLE_DISK_SHARE = 6.0  # student + F16 + fp32 graph + quantized files


@dataclass(frozen=True)
class Request:
    """What the user asked for, as flags."""

    target: str
    teacher: str | None = None
    config: Path | None = None
    out: Path | None = None
    device: str | None = None
    settings: Sequence[str] = ()


def resolve(request: Request) -> BuildConfig:
    """The resolved configuration of a request.

    Raises:
        ConfigError: an unknown target or key, or an impossible value.
    """
    flags: dict[str, Any] = {}
    if request.teacher is not None:
        flags["teacher"] = {"path": request.teacher}
    if request.device is not None:
        flags["validate"] = {"device": request.device}
    file = read_yaml(request.config) if request.config else None
    return resolve_config(read_target(request.target), file, list(request.settings), flags)


def find_teacher(config: BuildConfig) -> Path:
    """The teacher's folder: the given one, a downloaded one, or the demo teacher."""
    if config.teacher.path is None:
        from moe_edge.demo import demo_teacher_path

        return demo_teacher_path()
    from moe_edge.models.loading import resolve_teacher

    return resolve_teacher(config.teacher.path, config.teacher.revision)


def output_folder(request: Request, config: BuildConfig) -> Path:
    """--out, or runs/<teacher>-<target>."""
    if request.out is not None:
        return request.out
    name = Path(config.teacher.path).name if config.teacher.path else "demo-teacher"
    return Path("runs") / f"{name}-{config.target.name}"


def inspect_teacher(config: BuildConfig, *, students: bool = False) -> tuple[Path, CheckpointHeaders]:
    """The teacher's folder and headers; every refusal that needs no weights happens here.

    Args:
        students: take dense students, too.
    """
    teacher = find_teacher(config)
    headers = inspect_checkpoint(teacher)
    from moe_edge.families import family_of, student_family

    family = (student_family if students else family_of)(headers.config)
    family.tensors(headers.config, headers.tensors)
    return teacher, headers


def dry_run(request: Request) -> dict[str, Any]:
    """What fits, what it costs and why, from config.json and the safetensors headers (and a profile if one exists)."""
    from moe_edge.stages.plan import dry_run as options

    config = resolve(request)
    _, headers = inspect_teacher(config)
    out = output_folder(request, config)
    profile = out / "profile"
    return options(headers, config, profile if read_manifest(profile) else None, out / "plan")


def build(
    request: Request, *, start: str | None = None, until: str | None = None, fresh: bool = False
) -> tuple[Path, dict[str, Any] | None, dict[str, bool]]:
    """Run a build; returns its folder, the report (None when stopped before the end) and which stages were reused."""
    config = resolve(request)
    teacher, headers = inspect_teacher(config)
    _refuse_infeasible(headers, config)
    out = output_folder(request, config)
    with pipeline.locked(out):
        if fresh or not (out / "manifest.json").exists():
            pipeline.check_disk(out, int(DISK_SHARES.get(until or "", WHOLE_DISK_SHARE) * headers.total_bytes))
        state = pipeline.Build(
            config, teacher, checkpoint_digest(teacher), out, named_files=named_files(config), fresh=fresh
        )
        pipeline.run_stages(state, start, until)
        if until is not None and until != pipeline.STAGE_NAMES[-1]:
            return out, None, state.cached
        return out, finish(state), state.cached


def _refuse_infeasible(headers: CheckpointHeaders, config: BuildConfig) -> None:
    from moe_edge.planning.allocation import header_plan

    header_plan(headers, config)


def named_files(config: BuildConfig) -> dict[str, dict[str, str]]:
    """Per stage the digests of the texts that its settings name, so that editing one is noticed."""
    from moe_edge.texts.recipes import heldout_file, load_recipe

    recipe = load_recipe(config.calibration.recipe)
    calibration = {source.path: sha256_file(recipe.folder / source.path) for source in recipe.recipe.sources}
    heldout = heldout_file(config.validate_.text)
    if not heldout.is_file():
        raise ConfigError("no such text file", where=f"validate.text: {heldout}")
    earlier = Path(config.plan.within) if config.plan.within else None
    return {
        "profile": calibration,
        "plan": {earlier.name: sha256_file(earlier)} if earlier else {},
        "distill": _data_digests(config.distill.data),
        "validate": {heldout.name: sha256_file(heldout)},
    }


def _data_digests(data: str) -> dict[str, str]:
    """Of the files that `distill.data` names: a text, a recipe and its texts, or the manifest of a capture."""
    path = Path(data).expanduser()
    if path.is_file():
        from moe_edge.texts.recipes import load_recipe

        return {str(file): sha256_file(file) for file in (path, *load_recipe(data).files())}
    manifest = path / MANIFEST_NAME
    return {"capture": sha256_file(manifest)} if manifest.is_file() else {}


def finish(state: pipeline.Build) -> dict[str, Any]:
    """Report and manifest of a complete build; untouched when every stage was reused and all is still there."""
    report_path, kept = state.out / "report.json", read_manifest(state.out)
    if all(state.cached.values()) and kept is not None and not changed_files(state.out, kept.files):
        if kept.inputs == _digests(state) and kept.config == _resolved(state.config):
            report: dict[str, Any] = json.loads(report_path.read_text())
            return report
    return _write_results(state)


def _resolved(config: BuildConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", by_alias=True)


def _digests(state: pipeline.Build) -> dict[str, str]:
    return {"teacher": state.teacher_digest} | {name: manifest.digest for name, manifest in state.done.items()}


def _write_results(state: pipeline.Build) -> dict[str, Any]:
    from moe_edge.stages.report import write_report

    resolved = _resolved(state.config)
    write_text_atomic(state.out / "config.yaml", _as_yaml(resolved))
    report = write_report(
        state.out, [_stage_row(name, manifest, state.cached[name]) for name, manifest in state.done.items()], state.config,
        {name: manifest.summary for name, manifest in state.done.items()},
    )  # fmt: skip
    exported = state.done["export"].summary
    deliver_bundles(state.out, exported, state.config, state.teacher_digest)
    write_run_manifest(state.out, resolved, _digests(state), _versions())
    return report


def _versions() -> dict[str, str]:
    return {name: text for stage in pipeline.STAGES for name, text in pipeline.versions_of(stage).items()}


def deliver_bundles(out: Path, exported: Mapping[str, Any], config: BuildConfig, teacher_digest: str) -> None:
    """The device bundles of what was exported."""
    from moe_edge.export.bundles import write_bundles

    inputs = {"teacher": teacher_digest}
    for folder in write_bundles(out, exported["artifacts"], config, exported["name"], inputs, _versions()):
        log.info("device bundle: %s and %s.tar", out / folder, folder)


def _stage_row(name: str, manifest: Manifest, cached: bool) -> dict[str, Any]:
    cost = manifest.cost
    return {
        "name": name, "cached": cached,
        "seconds": cost.seconds if cost else 0.0, "peak_rss_mib": cost.peak_rss_mib if cost else None,
    }  # fmt: skip


def _as_yaml(data: Mapping[str, Any]) -> str:
    stream = StringIO()
    YAML(typ="safe").dump(dict(data), stream)
    return stream.getvalue()


def distill_student(request: Request, student: str, *, fresh: bool = False) -> tuple[Path, dict[str, Any]]:
    """Teach a student of the user's own from a mixture; returns the output folder and what was gained.

    Raises:
        ConfigError: the folder holds a build.
        InputRejected, ConfigError: as `stages.distill_pair.run`.
    """
    from moe_edge.models.loading import resolve_teacher
    from moe_edge.stages import distill_pair

    config = resolve(request)
    teacher, headers = inspect_teacher(config)
    folder = resolve_teacher(student, role="student")
    out = request.out or Path("runs") / f"{teacher.name}-to-{folder.name}"
    if (out / "compress").exists():
        raise ConfigError("the folder holds a build", where=str(out), next_command="--out with another folder")
    needed = 3 * inspect_checkpoint(folder).total_bytes  # weights, and a checkpoint with Adam's two moments
    texts = {"student": checkpoint_digest(folder)} | _data_digests(config.distill.data)
    with pipeline.locked(out):
        pipeline.check_disk(out, needed)
        state = pipeline.Build(
            config, teacher, checkpoint_digest(teacher), out, named_files={"distill": texts}, fresh=fresh,
            find_stage=lambda _: partial(distill_pair.run, student=folder),
        )  # fmt: skip
        pipeline.run_stage(state, pipeline.PAIR_STAGE, force=fresh)
        pipeline.dismiss_helpers()
    return out, state.done["distill"].summary


def export_plain(request: Request) -> tuple[Path, dict[str, Any]]:
    """Export any plain checkpoint as it is: no pruning budget, no training; a cached profile of it lends its imatrix."""
    from moe_edge.stages.export import export_model, plan_job
    from moe_edge.storage.cache import cached_profile_of
    from moe_edge.storage.statistics import Statistics

    config = resolve(request)
    model, _ = inspect_teacher(config, students=True)
    digest = checkpoint_digest(model)
    out = output_folder(request, config)
    if (out / "export" / MANIFEST_NAME).exists():
        raise ConfigError("the folder holds a build", where=str(out), next_command="--out with another folder")
    types = config.target.quantization
    cached = cached_profile_of(digest)
    statistics = Statistics.load(cached[0] / "statistics.safetensors") if cached else None
    if cached is None:
        log.warning(
            "no profile of this model is cached: quantizing without an imatrix ('moe-edge profile MODEL' makes one)"
        )
    with pipeline.locked(out):
        job = plan_job(
            config, model, out / "export", main=types.gguf[0], precision=types.onnx, statistics=statistics, kept=None,
            provenance={"base_digest": digest, "method": "plain export"},
        )  # fmt: skip
        pipeline.begin(out / "export", pipeline.plain_export_key(config, digest, cached and cached[1].digest))
        summary = export_model(job)
        deliver(out, model, out / "export")
        deliver_bundles(out, summary, config, digest)
        write_run_manifest(out, _resolved(config), {"teacher": digest}, _versions())
    return out, summary


def rewrite_report(run: Path) -> dict[str, Any]:
    """Write report.json and report.md again from the stages' manifests.

    Raises:
        ConfigError: a stage is missing.
    """
    from moe_edge.stages.report import write_report

    manifests = {name: read_manifest(run / name) for name in pipeline.STAGE_NAMES}
    if missing := [name for name, manifest in manifests.items() if manifest is None]:
        raise ConfigError(
            "the run is not complete",
            where=str(run),
            why=f"no finished stage: {', '.join(missing)}",
            next_command="moe-edge build ...",
        )
    config = BuildConfig.model_validate(read_yaml(run / "config.yaml").data)
    done = {name: manifest for name, manifest in manifests.items() if manifest is not None}
    old = read_manifest(run)
    report = write_report(
        run, [_stage_row(name, manifest, True) for name, manifest in done.items()], config,
        {name: manifest.summary for name, manifest in done.items()},
    )  # fmt: skip
    if old is not None:
        write_run_manifest(run, old.config, old.inputs, old.versions)
    return report
