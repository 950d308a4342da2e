"""The public functions of moe-edge: every command of the command line is one call of this file, with values for words.

    from moe_edge import build, plan

    run = build("path/to/teacher", target="jetson", overrides={"plan.experts": 64})
    run.report.verdict, run.artifacts.gguf[0].path

Settings come from the target, then a configuration file, then `overrides` (dotted key -> value). Whatever a user can cause ends
as a `MoeEdgeError`, which says what, where, why and what to do next.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_edge import pipeline
from moe_edge.contracts.artifacts import DistillFolder, ExportFolder, ProfileFolder
from moe_edge.contracts.checkpoint import Checkpoint, Teacher
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.config_io import read_yaml, resolve_config
from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.contracts.manifest import MANIFEST_NAME, read_manifest
from moe_edge.contracts.plan import Plan
from moe_edge.contracts.preview import PlanPreview
from moe_edge.contracts.report import Judgement, Report
from moe_edge.contracts.run import Artifacts as Artifacts
from moe_edge.contracts.run import DeliveredModel as DeliveredModel
from moe_edge.contracts.run import Run
from moe_edge.contracts.targets_io import read_target
from moe_edge.delivery import bundle, finish, plain
from moe_edge.devices.transport import open_transport
from moe_edge.process.ranks import current_ranks
from moe_edge.storage.files import model_name
from moe_edge.storage.folders import deliver, write_run_manifest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from moe_edge.contracts.evaluation import Evaluation
    from moe_edge.evaluation.instructions import EvaluationSettings
    from moe_edge.evaluation.validation import BenchedArtifact
    from moe_edge.storage.statistics import Statistics

log = logging.getLogger(__name__)
Source = str | Path | None  # a checkpoint folder or hub id; None: the demo teacher
Overrides = Mapping[str, Any]  # dotted key -> value


def configure(
    target: str,
    teacher: Source = None,
    config: str | Path | None = None,
    overrides: Overrides | None = None,
    *,
    settings: Sequence[str] = (),
    device: str | None = None,
) -> BuildConfig:
    """The resolved configuration of a call.

    Args:
        target: a shipped target's name, or the path of a .yaml.
        config: a build configuration (YAML).
        settings: `key=value` texts, as the command line has them.

    Raises:
        ConfigError: an unknown target or key, or an impossible value.
    """
    flags: dict[str, Any] = {}
    if teacher is not None:
        flags["teacher"] = {"path": str(teacher)}
    if device is not None:
        flags["validate"] = {"device": device}
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in (overrides or {}).items()}
    return resolve_config(read_target(target), read_yaml(Path(config)) if config else None, settings, flags, plain)


def find_checkpoint(config: BuildConfig, *, students: bool = False) -> Checkpoint:
    """The teacher, found and checked; every refusal that needs no weights happens here.

    Args:
        students: take dense students, too.

    Raises:
        ConfigError: there is none.
        InputRejected: it is corrupt, unsafe or unsupported.
    """
    from moe_edge.models.loading import read_checkpoint, resolve_teacher

    name = model_name(config.teacher.path)
    if config.teacher.path is None:
        from moe_edge.demo import demo_teacher_path

        return read_checkpoint(demo_teacher_path(), name, students=students)
    path = resolve_teacher(config.teacher.path, config.teacher.revision)
    return read_checkpoint(path, name, students=students)


def open_teacher(config: BuildConfig, *, students: bool = False) -> Teacher:
    """As `find_checkpoint`, and hashed."""
    from moe_edge.models.loading import hashed

    return hashed(find_checkpoint(config, students=students))


def output_folder(config: BuildConfig, out: str | Path | None) -> Path:
    """`out`, or runs/<teacher>-<target>."""
    return Path(out) if out is not None else Path("runs") / f"{model_name(config.teacher.path)}-{config.target.name}"


def preview(
    teacher: Source = None,
    *,
    target: str = "cpu",
    config: str | Path | None = None,
    overrides: Overrides | None = None,
    out: str | Path | None = None,
    settings: Sequence[str] = (),
) -> PlanPreview:
    """What fits, what it costs and why, from config.json and the safetensors headers (and a profile, if `out` has one)."""
    from moe_edge.planning.dry_run import preview_plan

    resolved = configure(target, teacher, config, overrides, settings=settings)
    folder = output_folder(resolved, out)
    profile = folder / "profile" if read_manifest(folder / "profile") else None
    return preview_plan(find_checkpoint(resolved), resolved, profile, folder / "plan")


def plan(
    teacher: Source = None,
    *,
    target: str = "cpu",
    config: str | Path | None = None,
    overrides: Overrides | None = None,
) -> Plan:
    """The plan as far as headers tell: how many experts, how wide, in which bits, and what that weighs.

    Which experts stay (`plan.kept`) is decided by a profile; expected losses are priors.

    Raises:
        ConfigError, InfeasibleError, InputRejected: wrong wishes, nothing that fits, a model that cannot be used.
    """
    from moe_edge.planning.dry_run import plan_from_headers

    resolved = configure(target, teacher, config, overrides)
    return plan_from_headers(find_checkpoint(resolved), resolved)


def build(
    teacher: Source = None,
    *,
    target: str = "cpu",
    config: str | Path | None = None,
    overrides: Overrides | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    start: str | None = None,
    until: str | None = None,
    fresh: bool = False,
    settings: Sequence[str] = (),
) -> Run:
    """Take a teacher to a validated student for a target: all stages, resumable.

    Args:
        out: the output folder, default runs/<teacher>-<target>.
        start: run from this stage on; earlier ones are used as they lie there.
        until: stop after this stage; without a report, unless it is the last.
        fresh: run every stage, reuse nothing.

    Returns:
        The run. A missed gate is no exception: look at `run.report.verdict`.
    """
    from moe_edge.models.loading import hashed
    from moe_edge.planning.allocation import header_plan
    from moe_edge.planning.disk import room_for_build
    from moe_edge.stages.export import refuse_tokenizer
    from moe_edge.texts.recipes import named_files

    for option, stage in (("start", start), ("until", until)):
        if stage is not None and stage not in pipeline.STAGE_NAMES:
            why = f"stages: {', '.join(pipeline.STAGE_NAMES)}"
            raise ConfigError(f"{option} '{stage}': no such stage", why=why)
    if start and until and pipeline.STAGE_NAMES.index(start) > pipeline.STAGE_NAMES.index(until):
        raise ConfigError(
            f"start '{start}' comes after until '{until}'", why=f"stages: {', '.join(pipeline.STAGE_NAMES)}"
        )
    resolved = configure(target, teacher, config, overrides, settings=settings, device=device)
    open_transport(resolved.validate_.device)  # a device that cannot be reached is said before anything is computed
    found = find_checkpoint(resolved)
    budget = header_plan(found.headers, resolved)  # refuses what cannot be before anything is read or locked
    if until is None or pipeline.STAGE_NAMES.index(until) >= pipeline.STAGE_NAMES.index("export"):
        refuse_tokenizer(resolved, found)
    folder = output_folder(resolved, out)
    with pipeline.locked(folder):
        state = pipeline.Build(
            resolved,
            hashed(found),
            folder,
            named_files=named_files(resolved),
            fresh=fresh,
            given={"plan": {"budget": budget}},
        )
        ranks = current_ranks()
        if waiting := pipeline.stages_to_run(state, start, until):
            room = ranks.lead(partial(room_for_build, folder, budget, resolved, waiting))
            log.log(logging.INFO if ranks.leads else logging.DEBUG, "disk: %s", room)
        pipeline.run_stages(state, start, until)
        if "export" in state.manifests:
            deliver(folder, state.folder("distill") / "model", state.folder("export"))
        report = finish(state) if "validate" in state.manifests else None
    return Run(folder, resolved, report, state.cached)


def profile(
    teacher: Source = None,
    *,
    target: str = "cpu",
    config: str | Path | None = None,
    overrides: Overrides | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
) -> ProfileFolder:
    """Measure a teacher over the calibration set, once for every target; arguments as those of `build`."""
    return build(
        teacher, target=target, config=config, overrides=overrides, out=out, until="profile", fresh=fresh
    ).profile


def compress(
    model: "PreTrainedModel",
    plan: Plan,
    *,
    rows: "Tensor | None" = None,
    statistics: "Statistics | None" = None,
) -> "PreTrainedModel":
    """Apply a plan to a model in memory; returns the student, which may share the model's tensors: the model is used up.

    Args:
        model: the teacher, as transformers loaded it.
        rows: token ids [N, S], int64, of the calibration set; needed where the plan fits something (a refit, a merge, ...).
        statistics: of a profile; needed where experts become narrower.

    Raises:
        ConfigError: the plan does not fit the model, or needs what was not given.
        InputRejected: the action does not know this family.
    """
    from moe_edge.compression.layers import Material
    from moe_edge.compression.surgery import apply_plan, check_plan
    from moe_edge.models.views import moe_layers

    views = moe_layers(model)
    check_plan(plan, views[0].count, [view.index for view in views])
    return apply_plan(model, plan, Material(statistics, rows)).model


def distill(
    teacher: Source = None,
    *,
    student: str | Path | None = None,
    target: str = "cpu",
    config: str | Path | None = None,
    overrides: Overrides | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
    settings: Sequence[str] = (),
) -> DistillFolder:
    """Recover a build's student from its teacher; or teach a student of your own, dense or a mixture, with any tokenizer.

    Raises:
        ConfigError: `out` holds a build and a student is given.
        Whatever the stages raise.
    """
    if student is None:
        return build(
            teacher,
            target=target,
            config=config,
            overrides=overrides,
            out=out,
            until="distill",
            fresh=fresh,
            settings=settings,
        ).student
    from moe_edge.models.loading import resolve_teacher
    from moe_edge.planning.disk import CHECKPOINT_BYTES, refuse_full_disk
    from moe_edge.stages import distill_pair
    from moe_edge.storage.checkpoint import checkpoint_digest, inspect_checkpoint
    from moe_edge.texts.recipes import data_digests

    resolved = configure(target, teacher, config, overrides, settings=settings)
    opened = open_teacher(resolved)
    learner = resolve_teacher(str(student), role="student")
    folder = Path(out) if out else Path("runs") / f"{opened.name}-to-{model_name(str(student))}"
    if (folder / "compress").exists():
        raise ConfigError("the folder holds a build", where=str(folder), next_command="--out with another folder")
    headers = inspect_checkpoint(learner)
    texts = {"student": checkpoint_digest(learner)} | data_digests(resolved.distill.data)
    with pipeline.locked(folder):
        refuse_full_disk(folder, {"distill": headers.total_bytes + CHECKPOINT_BYTES * headers.weights})
        state = pipeline.Build(
            resolved,
            opened,
            folder,
            named_files={"distill": texts},
            fresh=fresh,
            find_stage=lambda _: partial(distill_pair.run, student=learner),
        )
        pipeline.run_stage(state, pipeline.PAIR_STAGE, force=fresh)
        pipeline.dismiss_helpers()
    return DistillFolder.open(folder / "distill")


def export(
    model: str | Path,
    *,
    target: str = "cpu",
    config: str | Path | None = None,
    overrides: Overrides | None = None,
    out: str | Path | None = None,
    settings: Sequence[str] = (),
) -> Run:
    """Export any plain checkpoint as it is: no pruning budget, no training; a cached profile of it lends its imatrix."""
    from moe_edge.stages.export import export_model, plain_job
    from moe_edge.storage.cache import cached_profile_of

    resolved = configure(target, model, config, overrides, settings=settings)
    opened = open_teacher(resolved, students=True)
    folder = output_folder(resolved, out)
    work = folder / "export"
    if (work / MANIFEST_NAME).exists():
        raise ConfigError("the folder holds a build", where=str(folder), next_command="--out with another folder")
    cached = cached_profile_of(opened.digest)
    if cached is None:
        command = "'moe-edge profile MODEL' makes one"
        log.warning("no profile of this model is cached: quantizing without an imatrix (%s)", command)
    profile = ProfileFolder.of(*cached) if cached else None
    with pipeline.locked(folder):
        job = plain_job(resolved, opened, work, profile)
        pipeline.begin(work, pipeline.plain_export_key(resolved, opened.digest, profile.digest if profile else None))
        exported = ExportFolder(work, "", export_model(job))
        deliver(folder, opened.path, work)
        bundle(folder, exported, resolved, opened.digest)
        write_run_manifest(folder, plain(resolved), {"teacher": opened.digest}, pipeline.all_versions())
    return Run(folder, resolved, exported=exported.summary)


def validate(
    artifact: str | Path,
    *,
    teacher: Source = None,
    target: str = "cpu",
    config: str | Path | None = None,
    overrides: Overrides | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    settings: Sequence[str] = (),
) -> Judgement:
    """Compare an artifact with its teacher on held-out text, measure its speed, and apply the target's gates.

    Args:
        artifact: a .gguf file, an ONNX folder or a checkpoint folder.
        out: where measurements stay, default runs/<artifact>-validate.
    """
    path = _sane(artifact)
    from moe_edge.evaluation.validation import validate_artifact

    resolved = configure(target, teacher, config, overrides, settings=settings, device=device)
    open_transport(resolved.validate_.device)
    return validate_artifact(path, open_teacher(resolved), resolved, _beside(path, out, "validate"))


def bench(
    artifact: str | Path,
    *,
    device: str = "local",
    target: str = "cpu",
    overrides: Overrides | None = None,
    out: str | Path | None = None,
    settings: Sequence[str] = (),
) -> "BenchedArtifact":
    """Measure an artifact's speed and memory in a fresh process; arguments as those of `validate`."""
    path = _sane(artifact)
    from moe_edge.evaluation.validation import bench_artifact

    resolved = configure(target, overrides=overrides, settings=settings, device=device)
    return bench_artifact(path, resolved, _beside(path, out, "bench"))


def _sane(artifact: str | Path) -> Path:
    """The artifact's path, its headers checked before anything heavy is imported: a crafted file is refused in a moment."""
    from moe_edge.devices.detect import refuse_bad_headers

    refuse_bad_headers(Path(artifact))
    return Path(artifact)


def _beside(artifact: Path, out: str | Path | None, what: str) -> Path:
    """`out`, or runs/<artifact>-<what>; made if it is not there."""
    folder = Path(out) if out is not None else Path("runs") / f"{model_name(str(artifact))}-{what}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def evaluate(
    artifact: str | Path,
    data: Sequence[str | Path],
    *,
    limit: int | None = None,
    settings: "EvaluationSettings | None" = None,
    out: str | Path | None = None,
) -> "Evaluation":
    """Let an artifact answer instruction sets and score the answers: ROUGE-L, BLEU, chrF, exact match; resumable.

    Args:
        data: instruction sets (.jsonl).
        limit: only the first rows of each set.
    """
    from moe_edge.evaluation.instructions import EvaluationSettings, run
    from moe_edge.texts.instruction_rows import read_instruction_sets

    path = Path(artifact)
    sets = read_instruction_sets([Path(one) for one in data], limit)
    folder = Path(out) if out is not None else Path("runs") / f"{model_name(str(path))}-evaluate"
    with pipeline.locked(folder):
        return run(path, sets, settings or EvaluationSettings(), folder)


def report(run: str | Path) -> Report:
    """The report of a finished build, read from its folder, which stays as it is.

    Raises:
        ConfigError: there is none.
        InputRejected: report.json is damaged.
    """
    out = Path(run)
    path = out / "report.json"
    if path.is_file():
        try:
            return Report.read(path)
        except ValueError as error:
            again = "the same `moe-edge build` again writes it anew"
            raise InputRejected("the report is damaged", where=str(path), why=str(error), next_command=again) from error
    missing = [name for name in pipeline.STAGE_NAMES if not (out / name / MANIFEST_NAME).is_file()]
    why = f"no finished stage: {', '.join(missing)}" if missing else "all stages are finished, but not the build"
    raise ConfigError("the run is not complete", where=str(out), why=why, next_command="moe-edge build ...")
