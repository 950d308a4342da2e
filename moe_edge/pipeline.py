"""The stages in order, and when one is skipped: this file is the whole story of a build.

teacher -> profile -> plan -> compress -> distill -> export -> validate, then delivery and report (api.py). A stage is skipped
when the key in its folder's manifest equals the key of what would be computed now and the files still have their digests. A
stage writes into its own folder; its manifest is written last. After a kill the folder has no manifest: the stage runs again and
may resume from what it finds there, provided that the folder was begun for the same key. Of several processes (process/ranks.py)
the leader decides, writes and runs what is not shared; the others take part in the stages of SHARED.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from pydantic import BaseModel

from moe_edge.contracts.artifacts import FOLDERS, StageFolder
from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.config_io import value_at
from moe_edge.contracts.errors import ConfigError, EnvironmentProblem
from moe_edge.contracts.manifest import (
    MANIFEST_NAME,
    Cost,
    Manifest,
    content_digest,
    installed_version,
    read_manifest,
    stage_key,
)
from moe_edge.metrics.memory import PeakRss
from moe_edge.process.limits import exhaustion_named
from moe_edge.process.progress import raise_pending_interrupt
from moe_edge.process.ranks import current_ranks, lost_processes_named
from moe_edge.storage.cache import publish_profile, reuse_profile
from moe_edge.storage.files import write_json_atomic, write_text_atomic
from moe_edge.storage.folders import changed_files, hash_folder
from moe_edge.version import __version__

log = logging.getLogger(__name__)
RSS_INTERVAL_S = 0.5  # a look walks /proc and holds the GIL: at 0.03 s it cost a training step a tenth
BEGUN = ".key"  # in an unfinished stage folder: the key it was begun for


@dataclass(frozen=True)
class Stage:
    """One row of the pipeline: what its key depends on, which is what its function reads."""

    name: str
    reads: tuple[str, ...]  # keys of the configuration, dotted: all that change what is computed, and no others
    takes: tuple[str, ...]  # earlier stages whose folders it is given, and whose digests it pins
    packages: tuple[str, ...] = ()  # beside torch and transformers
    schema: int = 1  # raised when the stage's output changes meaning

    def config_for_key(self, config: BuildConfig) -> dict[str, Any]:
        """The values of `reads`."""
        whole = config.model_dump(mode="json", by_alias=True)
        return {dotted: value_at(whole, dotted) for dotted in self.reads}


_RUNTIMES = ("llama-cpp-python", "gguf", "onnxruntime", "onnxruntime-genai")
_EXPORTED = ("export.formats", "export.gguf", "export.onnx", "target.formats", "target.quantization")
STAGES: tuple[Stage, ...] = (
    Stage("profile", ("teacher.dtype", "calibration", "profile"), (), schema=3),
    Stage(
        "plan",
        (
            *("plan", *_EXPORTED, "target.context_length", "target.context_least", "target.budget", "target.device"),
            *(f"target.hardware.{fact}.value" for fact in ("memory_bytes", "usable_share")),
            *(f"target.hardware.{fact}.value" for fact in ("bandwidth_gb_per_s", "bandwidth_efficiency")),
            *("target.runtime.kv_cache", "target.runtime.gpu_layers", "profile.mode", "teacher.dtype"),
        ),
        ("profile",),
        ("matplotlib", "llama-cpp-python"),
        schema=4,
    ),
    Stage("compress", ("profile.mode", "plan.tokens"), ("profile", "plan"), schema=4),
    Stage(
        "distill",
        ("distill", "calibration.sequence_length", "profile.logits"),
        ("profile", "plan", "compress"),
        ("accelerate",),
        schema=4,
    ),
    Stage(
        "export",
        ("teacher.path", *_EXPORTED, "target.budget.weights", "target.budget.bytes", "target.runtime.threads"),
        ("profile", "plan", "compress", "distill"),
        _RUNTIMES,
        schema=2,
    ),
    Stage(
        "validate",
        ("validate", "calibration.sequence_length", "target.runtime.threads"),
        ("profile", "plan", "distill", "export"),
        _RUNTIMES,
        schema=2,
    ),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)
# `moe-edge distill --student`: the same stage for a student that no plan made
PAIR_STAGE = Stage("distill", ("distill", "calibration", "profile.logits"), (), ("accelerate",), schema=2)
SHARED = ("profile", "distill")  # the stages in which several processes take part
StageRun = Callable[..., BaseModel | None]  # see contracts/artifacts.py; None in a process that only helps


def load_stage(name: str) -> StageRun:
    """The stage's function; imported late, because stages import torch and the runtimes."""
    run: StageRun = import_module(f"moe_edge.stages.{name}").run
    return run


@dataclass
class Build:
    """A build in its output folder, and what has been done so far."""

    config: BuildConfig
    teacher: Teacher
    out: Path
    # stage -> digests of the files that its settings name
    named_files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fresh: bool = False
    given: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # stage -> what was found before it, by name
    manifests: dict[str, Manifest] = field(default_factory=dict)  # of the finished stages
    cached: dict[str, bool] = field(default_factory=dict)  # were they reused
    find_stage: Callable[[str], StageRun] = load_stage  # tests bring their own

    def folder(self, stage: str) -> Path:
        """Where a stage writes."""
        return self.out / stage

    def finished(self, stage: str) -> StageFolder[Any]:
        """The typed folder of a stage that is done."""
        return FOLDERS[stage].of(self.folder(stage), self.manifests[stage])

    def inputs(self, stage: Stage) -> dict[str, str]:
        """What a stage is made from: the digests of the teacher, the earlier stages and the files that its settings name."""
        digests = {name: self.manifests[name].digest for name in stage.takes}
        return {"teacher": self.teacher.digest} | dict(self.named_files.get(stage.name, {})) | digests

    def key(self, stage: Stage) -> str:
        """What names the stage's computation."""
        config = stage.config_for_key(self.config)
        return stage_key(stage.name, stage.schema, config, self.inputs(stage), versions_of(stage))

    def call(self, stage: Stage) -> BaseModel | None:
        """Run the stage's function on the folders that it takes."""
        earlier = {name: self.finished(name) for name in stage.takes}
        more = self.given.get(stage.name, {})
        with exhaustion_named(stage.name, self.folder(stage.name)):
            return self.find_stage(stage.name)(self.config, self.teacher, self.folder(stage.name), **earlier, **more)


def versions_of(stage: Stage) -> dict[str, str]:
    """What the stage's key and manifest pin: our own version and those of the packages it computes with."""
    return {"moe-edge": __version__} | {
        name: installed_version(name) for name in ("torch", "transformers", *stage.packages)
    }


def all_versions() -> dict[str, str]:
    """The same of every stage together."""
    return {name: text for stage in STAGES for name, text in versions_of(stage).items()}


def plain_export_key(config: BuildConfig, model_digest: str, profile_digest: str | None) -> str:
    """The key of an export without a build: another model, configuration or profile must not find the files of this one."""
    stage = next(stage for stage in STAGES if stage.name == "export")
    inputs = {"model": model_digest, "profile": profile_digest or ""}
    return stage_key("plain export", stage.schema, stage.config_for_key(config), inputs, versions_of(stage))


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the output folder for one build; of several processes that share its work, the leader holds it for all.

    Raises:
        EnvironmentProblem: another build holds it, or it cannot be written.
    """
    ranks, lock = current_ranks(), FileLock(out / ".lock")
    ranks.lead(partial(_acquire, lock, out))
    try:
        yield
    finally:
        if ranks.leads:
            (out / ".lock.json").unlink(missing_ok=True)
            lock.release()


def _acquire(lock: BaseFileLock, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise EnvironmentProblem(
            "the output folder is in use by another build",
            where=f"{out}, {_holder(out)}",
            next_command="wait, or choose another --out",
        ) from error
    except PermissionError as error:
        raise EnvironmentProblem("the output folder cannot be written", where=str(out), why=str(error)) from error
    holder = {"pid": os.getpid(), "host": os.uname().nodename, "since": time.strftime("%F %T")}
    write_json_atomic(out / ".lock.json", holder)


def _holder(out: Path) -> str:
    try:
        return (out / ".lock.json").read_text().replace("\n", " ").strip()
    except OSError:
        return "held by an unknown process"


def run_stages(build: Build, start: str | None = None, until: str | None = None) -> None:
    """Run or reuse every stage up to `until`; from `start` on, run even what could be reused.

    Raises:
        ConfigError: `start` needs stages that have not been built.
        Any MoeEdgeError of a stage; its folder stays without a manifest.
    """
    wanted = _wanted(start, until)
    last = wanted[-1][0].name
    if current_ranks().world > 1 and last not in SHARED:
        raise ConfigError(
            f"several processes can share {' and '.join(SHARED)}, but not '{last}'",
            next_command="accelerate launch ... -m moe_edge distill ..., then the build in one process",
        )
    for stage, adopted in wanted:
        raise_pending_interrupt()
        if adopted:
            build.manifests[stage.name] = current_ranks().lead(partial(_adopted, build, stage))
            build.cached[stage.name] = True
        else:
            run_stage(build, stage, force=build.fresh or start is not None)
    dismiss_helpers()


def stages_to_run(build: Build, start: str | None = None, until: str | None = None) -> tuple[str, ...]:
    """Which stages `run_stages` would run, as far as manifests tell: all behind the first whose key does not match."""
    probe, names = replace(build, manifests={}), list[str]()
    for stage, adopted in _wanted(start, until):
        manifest = read_manifest(build.folder(stage.name))
        forced = build.fresh or (start is not None and not adopted)
        if names or forced or manifest is None or not (adopted or manifest.key == probe.key(stage)):
            names.append(stage.name)
        else:
            probe.manifests[stage.name] = manifest
    return tuple(names)


def _wanted(start: str | None, until: str | None) -> list[tuple[Stage, bool]]:
    """The stages up to `until`, each with: does it come before `start`, so that it is adopted as it lies there?"""
    first = STAGE_NAMES.index(start) if start else 0
    last = STAGE_NAMES.index(until) if until else len(STAGES) - 1
    return [(stage, position < first) for position, stage in enumerate(STAGES[: last + 1])]


def dismiss_helpers() -> None:
    """End every process but the leader: what the stages found is its to write and report."""
    if not current_ranks().leads:
        raise SystemExit(0)


def _adopted(build: Build, stage: Stage) -> Manifest:
    """Take an earlier stage as it lies there, also when a user edited its files."""
    folder = build.folder(stage.name)
    manifest = read_manifest(folder)
    if manifest is None:
        raise ConfigError(
            f"--from needs a finished '{stage.name}' stage",
            where=str(folder),
            next_command="run the build without --from first",
        )
    if changed := changed_files(folder, manifest.files):
        log.warning("%s was edited by hand and is used as it is: %s", stage.name, ", ".join(changed))
        manifest.files = hash_folder(folder)
        manifest.digest, manifest.edited = content_digest(manifest.files), True
        write_text_atomic(folder / MANIFEST_NAME, manifest.to_json())
    return manifest


def run_stage(build: Build, stage: Stage, force: bool = False) -> None:
    """Reuse the stage's folder if it is what would be computed now, else run the stage, in all processes if it is shared."""
    ranks = current_ranks()
    if not ranks.leads:
        logging.getLogger("moe_edge").setLevel(logging.ERROR)  # the leader says the rest, once
    with lost_processes_named():
        kept = ranks.lead(partial(_kept, build, stage, force))
        build.cached[stage.name] = kept is not None
        if kept is None and stage.name in SHARED:
            ranks.take_accelerator()
            if not ranks.leads:
                build.call(stage)
        build.manifests[stage.name] = kept or ranks.lead(partial(_execute, build, stage))


def _kept(build: Build, stage: Stage, force: bool) -> Manifest | None:
    """The manifest of a folder that can be reused; None when the stage has to run, its folder begun."""
    folder, key = build.folder(stage.name), build.key(stage)
    if not force:
        if stage.name == "profile":
            reuse_profile(folder, key)
        if (manifest := _reusable(folder, key)) is not None:
            log.info("%s: nothing to do", stage.name)
            return manifest
    begin(folder, key, force)
    log.info("%s: running", stage.name)
    return None


def _reusable(folder: Path, key: str) -> Manifest | None:
    manifest = read_manifest(folder)
    if manifest is None or manifest.key != key:
        return None
    if changed := changed_files(folder, manifest.files):
        kept = folder.with_name(folder.name + ".modified")
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept)
        log.warning(
            "%s: %s changed since it was written; building it again (the changed folder is kept as %s; "
            "to build on your edit use --from)",
            folder.name,
            ", ".join(changed),
            kept.name,
        )
        return None
    return manifest


def begin(folder: Path, key: str, force: bool = False) -> None:
    """An empty folder, or the unfinished one of an earlier run with the same key."""
    begun = folder / BEGUN
    finished = (folder / MANIFEST_NAME).exists()
    if not finished and not force and begun.is_file() and begun.read_text() == key:
        log.info("%s: resuming", folder.name)
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text_atomic(begun, key)


def _execute(build: Build, stage: Stage) -> Manifest:
    folder, key, started = build.folder(stage.name), build.key(stage), time.monotonic()
    with PeakRss(interval_s=RSS_INTERVAL_S) as memory:
        summary = build.call(stage)
    assert summary is not None  # this is the leader
    (folder / BEGUN).unlink()
    files = hash_folder(folder)
    manifest = Manifest(
        stage=stage.name,
        key=key,
        digest=content_digest(files),
        files=files,
        summary=summary.model_dump(mode="json"),
        inputs=build.inputs(stage),
        config=stage.config_for_key(build.config),
        versions=versions_of(stage),
        cost=Cost(seconds=round(time.monotonic() - started, 3), peak_rss_mib=memory.peak_rss_mib),
    )
    write_text_atomic(folder / MANIFEST_NAME, manifest.to_json())
    if stage.name == "profile":
        publish_profile(folder, key)
    return manifest
