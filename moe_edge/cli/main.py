"""The command line: one subcommand per stage and `build`; results on stdout, logs and progress on stderr.

Everything heavy is imported inside the command that needs it, so that `--help` answers at once. Exit codes: 0 ok, 1 internal
bug, 2 usage or configuration, 3 infeasible budget, 4 input rejected, 5 environment or lock, 6 resources, 7 device, 10 gate
failed, 130 and 143 signals.
"""

import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import typer

from moe_edge.cli.evaluate import evaluate
from moe_edge.cli.logits import logits
from moe_edge.cli.tables import cache, targets
from moe_edge.contracts.errors import (
    ConfigError,
    EnvironmentProblem,
    GateFailed,
    InputRejected,
    MoeEdgeError,
    ResourceProblem,
    exhaustion,
    visible,
)
from moe_edge.process.progress import ConsoleHandler, Terminated, handle_interrupts

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Take a Mixture-of-Experts teacher to a smaller, quantized, validated student on an edge device.",
)
app.add_typer(targets, name="targets")
app.add_typer(cache, name="cache")
app.command()(evaluate)
app.add_typer(logits, name="logits")

log = logging.getLogger(__name__)

Teacher = Annotated[str | None, typer.Argument(help="A checkpoint folder or hub id; without it, the demo teacher.")]
TargetOption = Annotated[str, typer.Option("--target", "-t", help="A shipped target, or the path of a target .yaml.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="A build configuration (YAML).")]
OutOption = Annotated[Path | None, typer.Option("--out", "-o", help="Output folder; default runs/<teacher>-<target>.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override one key, e.g. --set plan.experts=10.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Only JSON on stdout.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="local (ssh:// and adb: are not supported yet).")]
FromOption = Annotated[
    str | None, typer.Option("--from", help="Run from this stage on; earlier ones are used as they lie there.")
]
UntilOption = Annotated[str | None, typer.Option("--until", help="Stop after this stage.")]
StudentOption = Annotated[
    str | None,
    typer.Option("--student", help="Teach this checkpoint, dense or a mixture, whatever its tokenizer; no build."),
]
ArtifactArgument = Annotated[Path, typer.Argument(help="A .gguf file, an ONNX folder or a checkpoint folder.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Run every stage, reuse nothing.")]


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs the app (on the process's arguments if none are given) and maps every error to its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[ConsoleHandler()])
    for noisy in (
        "httpx",
        "transformers",
        "accelerate",
        "matplotlib",
        "onnxscript",
        "onnx_ir",
        "filelock",
        "gguf",
        "absl",
    ):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries; ours are those of process/progress.py
    handle_interrupts()
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    resume = "the same command resumes where it stopped"
    try:
        app(args=arguments)
    except SystemExit as stop:
        if stop.code == 130:  # typer turns Ctrl-C into an exit
            return _say(f"interrupted; {resume}", 130)
        return stop.code if isinstance(stop.code, int) else 1
    except MoeEdgeError as error:
        return _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _say(f"interrupted; {resume}", 130)
    except Terminated:
        return _say(f"terminated; {resume}", 143)
    except Exception as error:
        if why := exhaustion(error):
            return _say(str(ResourceProblem("out of memory", why=why, next_command=resume)), 6)
        return _os_error(error) if isinstance(error, OSError) else _bug()
    return 0


def _os_error(error: OSError) -> int:
    where = str(error.filename) if error.filename else None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        again = "free some space; the same command resumes where it stopped"
        return _say(str(ResourceProblem("the disk is full", where=where, next_command=again)), 6)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _say(str(EnvironmentProblem("no permission", where=where, why=str(error))), 5)
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return _say(str(ConfigError("the path cannot be used", where=where, why=error.strerror)), 2)
    return _bug()


def _bug() -> int:
    """The traceback of the exception being handled, for whoever will mend it."""
    traceback.print_exc()
    return _say("internal error: this is a bug in moe-edge; please report it with the lines above", 1)


def _say(text: str, code: int) -> int:
    print(f"moe-edge: {visible(text)}", file=sys.stderr)
    return code


def _print(data: Any) -> None:
    print(json.dumps(data, indent=1, default=str))


@app.command()
def build(
    teacher: Teacher = None,
    target: TargetOption = "cpu",
    config: ConfigOption = None,
    out: OutOption = None,
    device: DeviceOption = None,
    settings: SetOption = None,
    start: FromOption = None,
    until: UntilOption = None,
    fresh: FreshOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what fits and what it costs.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take TEACHER to a validated student for a target: all stages, resumable."""
    if dry_run:
        return plan(teacher, target, config, out, settings, as_json)
    given: Given = {"target": target, "config": config, "out": out, "settings": settings or ()}
    _build(as_json, until, teacher, device=device, start=start, until=until, fresh=fresh, **given)


class Given(TypedDict):
    """The options that every command with a configuration has, as arguments of api.py."""

    target: str
    config: Path | None
    out: Path | None
    settings: Sequence[str]


def _build(as_json: bool, last: str | None, *arguments: Any, **options: Any) -> None:
    """Run a build and say what became of it; a missed gate is an error with an exit code of its own."""
    from moe_edge import api

    run = api.build(*arguments, **options)
    if all(run.reused.values()):
        log.info("nothing to do: every stage is up to date in %s", run.out)
    if run.report is None:
        return (
            _print({"out": str(run.out), "stages": run.reused})
            if as_json
            else print(f"{run.out}: finished until {last}")
        )
    print((run.out / ("report.json" if as_json else "report.md")).read_text())
    if run.report.verdict != "pass":
        why = "; ".join(run.report.reasons)
        raise GateFailed("the build missed its gates", where=str(run.out / "report.md"), why=why)


@app.command()
def plan(
    teacher: Teacher = None,
    target: TargetOption = "cpu",
    config: ConfigOption = None,
    out: OutOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what fits, what it costs and why; reads headers only (and a profile if there is one)."""
    from moe_edge import api
    from moe_edge.reporting.options_text import options_text

    preview = api.preview(teacher, target=target, config=config, out=out, settings=settings or ())
    _print(preview.to_dict()) if as_json else print(options_text(preview))


def _stage_command(name: str, text: str) -> None:
    """One command per stage that needs the earlier ones: `build --until NAME`."""

    def command(
        teacher: Teacher = None,
        target: TargetOption = "cpu",
        config: ConfigOption = None,
        out: OutOption = None,
        settings: SetOption = None,
        fresh: FreshOption = False,
        as_json: JsonOption = False,
    ) -> None:
        given: Given = {"target": target, "config": config, "out": out, "settings": settings or ()}
        _build(as_json, name, teacher, until=name, fresh=fresh, **given)

    app.command(name, help=text)(command)


_stage_command("profile", "Measure the teacher over the calibration set, once for every target.")
_stage_command("compress", "Apply the plan: profile and plan are made if they are missing.")


@app.command()
def distill(
    teacher: Teacher = None,
    target: TargetOption = "cpu",
    config: ConfigOption = None,
    out: OutOption = None,
    student: StudentOption = None,
    settings: SetOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Recover quality from the teacher: earlier stages are made if they are missing. Or teach a --student of your own."""
    given: Given = {"target": target, "config": config, "out": out, "settings": settings or ()}
    if student is None:
        return _build(as_json, "distill", teacher, until="distill", fresh=fresh, **given)
    from moe_edge import api

    taught = api.distill(teacher, student=student, fresh=fresh, **given)
    if as_json:
        return _print({"out": str(taught.path.parent), **taught.summary.model_dump(mode="json")})
    print(f"{taught.model}: {taught.summary.kept}; {taught.summary.reason}")
    print(f"next: moe-edge export {taught.model} --target TARGET")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Any checkpoint folder of a supported family; exported as it is.")],
    target: TargetOption = "cpu",
    config: ConfigOption = None,
    out: OutOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export a checkpoint to GGUF and ONNX without compressing it; every file is reopened and compared."""
    from moe_edge import api

    run = api.export(model, target=target, config=config, out=out, settings=settings or ())
    assert run.exported is not None
    if as_json:
        return _print({"out": str(run.out), **run.exported.model_dump(mode="json", exclude_unset=True)})
    for row in (*run.artifacts.gguf, *run.artifacts.onnx):
        print(f"{row.path}  {row.bytes / 2**20:.1f} MiB  {row.bits_per_weight} bits/weight")


@app.command()
def validate(
    artifact: ArtifactArgument,
    teacher: Annotated[str, typer.Option("--teacher", help="The model it is compared with.")],
    target: TargetOption = "cpu",
    config: ConfigOption = None,
    out: OutOption = None,
    device: DeviceOption = None,
    settings: SetOption = None,
) -> None:
    """Compare an artifact with its teacher on held-out text and measure its speed."""
    from moe_edge import api

    given: Given = {"target": target, "config": config, "out": out, "settings": settings or ()}
    result = api.validate(artifact, teacher=teacher, device=device, **given)
    _print(result.to_dict())
    if result.verdict != "pass":
        raise GateFailed("the artifact missed its gates", where=str(artifact))


@app.command()
def bench(
    artifact: ArtifactArgument,
    device: Annotated[str, typer.Option("--device", help="local (ssh:// and adb: are not supported yet).")] = "local",
    target: TargetOption = "cpu",
    out: OutOption = None,
    settings: SetOption = None,
) -> None:
    """Measure an artifact's speed and memory in a fresh process."""
    from moe_edge import api

    _print(api.bench(artifact, device=device, target=target, out=out, settings=settings or ()).to_dict())


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A build's output folder.")], as_json: JsonOption = False) -> None:
    """Print the report of a finished build; nothing is written."""
    from moe_edge import api
    from moe_edge.reporting.report_markdown import render

    found = api.report(run)
    print(json.dumps(found.to_dict(), indent=2, sort_keys=True) if as_json else render(found))


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="A build's folder, a device bundle or a bundle's .tar.")]) -> None:
    """Check every file against the manifest: its sha256, nothing missing, nothing extra, sane headers."""
    from moe_edge.exporting.verification import faults

    if found := faults(path):
        raise InputRejected("not what its manifest says", where=str(path), why="; ".join(found))
    print(f"{path}: every delivered file has its recorded sha256")


@app.command()
def doctor() -> None:
    """Check this machine: versions, runtimes, memory, disk."""
    from moe_edge.cli.doctor import examine

    rows = examine()
    for row in rows:
        print(f"{'ok ' if row.ok else 'BAD'} {row.name}: {row.finding}")
    if bad := [row for row in rows if not row.ok]:
        why = "; ".join(f"{row.name}: {row.finding}" for row in bad)
        raise EnvironmentProblem("this machine is not ready", why=why, next_command=bad[0].fix)


@app.command("config-schema")
def config_schema() -> None:
    """The JSON Schema of a build configuration, for editors."""
    from moe_edge.contracts.config import BuildConfig

    _print(BuildConfig.model_json_schema(by_alias=True))
