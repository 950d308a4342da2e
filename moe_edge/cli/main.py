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
from pathlib import Path
from typing import Annotated, Any

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
)
from moe_edge.process.progress import Terminated, handle_interrupts

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Take a Mixture-of-Experts teacher to a smaller, quantized, validated student on an edge device.",
)  # fmt: skip
app.add_typer(targets, name="targets")
app.add_typer(cache, name="cache")
app.command()(evaluate)
app.add_typer(logits, name="logits")

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
FreshOption = Annotated[bool, typer.Option("--fresh", help="Run every stage, reuse nothing.")]


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs the app (on the process's arguments if none are given) and maps every error to its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
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
    except MemoryError:
        return _say(str(ResourceProblem("out of memory", next_command=resume)), 6)
    except OSError as error:
        return _os_error(error)
    except Exception:
        return _bug()
    return 0


def _os_error(error: OSError) -> int:
    where = str(error.filename) if error.filename else None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        again = "free some space; the same command resumes where it stopped"
        return _say(str(ResourceProblem("the disk is full", where=where, next_command=again)), 6)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _say(str(EnvironmentProblem("no permission", where=where, why=str(error))), 5)
    return _bug()


def _bug() -> int:
    """The traceback of the exception being handled, for whoever will mend it."""
    traceback.print_exc()
    return _say("internal error: this is a bug in moe-edge; please report it with the lines above", 1)


def _say(text: str, code: int) -> int:
    print(f"moe-edge: {text}", file=sys.stderr)
    return code


def _request(
    teacher: str | None, target: str, config: Path | None, out: Path | None, device: str | None, settings: list[str] | None
) -> Any:  # fmt: skip
    from moe_edge.api import Request

    return Request(target, teacher, config, out, device, settings or ())


def _print(data: Any) -> None:
    print(json.dumps(data, indent=1, default=str))


@app.command()
def build(
    teacher: Teacher = None, target: TargetOption = "cpu", config: ConfigOption = None, out: OutOption = None,
    device: DeviceOption = None, settings: SetOption = None,
    start: FromOption = None, until: UntilOption = None,
    fresh: FreshOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what fits and what it costs.")] = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Take TEACHER to a validated student for a target: all stages, resumable."""
    request = _request(teacher, target, config, out, device, settings)
    if dry_run:
        return _show_plan(request, as_json)
    from moe_edge.pipeline import STAGE_NAMES

    for option, value in (("--from", start), ("--until", until)):
        if value is not None and value not in STAGE_NAMES:
            raise ConfigError(f"{option} {value}: no such stage", why=f"stages: {', '.join(STAGE_NAMES)}")
    _build(request, start, until, fresh, as_json)


def _build(request: Any, start: str | None, until: str | None, fresh: bool, as_json: bool) -> None:
    from moe_edge.api import build as run_build

    out, report, cached = run_build(request, start=start, until=until, fresh=fresh)
    if all(cached.values()):
        logging.getLogger(__name__).info("nothing to do: every stage is up to date in %s", out)
    if report is None:
        _print({"out": str(out), "stages": cached}) if as_json else print(f"{out}: finished until {until}")
        return
    _print(report) if as_json else print((out / "report.md").read_text())
    if report["verdict"] != "pass":
        raise GateFailed("the build missed its gates", where=str(out / "report.md"), why="; ".join(report["reasons"]))


@app.command()
def plan(
    teacher: Teacher = None, target: TargetOption = "cpu", config: ConfigOption = None, out: OutOption = None,
    settings: SetOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Say what fits, what it costs and why; reads headers only (and a profile if there is one)."""
    _show_plan(_request(teacher, target, config, out, None, settings), as_json)


def _show_plan(request: Any, as_json: bool) -> None:
    from moe_edge.api import dry_run
    from moe_edge.reporting.options_text import options_text

    options = dry_run(request)
    _print(options) if as_json else print(options_text(options))


def _stage_command(name: str, text: str) -> None:
    """One command per stage that needs the earlier ones: `build --until NAME`."""

    def command(
        teacher: Teacher = None, target: TargetOption = "cpu", config: ConfigOption = None, out: OutOption = None,
        settings: SetOption = None, fresh: FreshOption = False, as_json: JsonOption = False,
    ) -> None:  # fmt: skip
        _build(_request(teacher, target, config, out, None, settings), None, name, fresh, as_json)

    app.command(name, help=text)(command)


_stage_command("profile", "Measure the teacher over the calibration set, once for every target.")
_stage_command("compress", "Apply the plan: profile and plan are made if they are missing.")


@app.command()
def distill(
    teacher: Teacher = None, target: TargetOption = "cpu", config: ConfigOption = None, out: OutOption = None,
    student: Annotated[
        str | None,
        typer.Option("--student", help="Teach this checkpoint, dense or a mixture, whatever its tokenizer; no build."),
    ] = None,
    settings: SetOption = None, fresh: FreshOption = False, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Recover quality from the teacher: earlier stages are made if they are missing. Or teach a --student of your own."""
    request = _request(teacher, target, config, out, None, settings)
    if student is None:
        return _build(request, None, "distill", fresh, as_json)
    from moe_edge.api import distill_student

    folder, summary = distill_student(request, student, fresh=fresh)
    if as_json:
        return _print({"out": str(folder), **summary})
    print(f"{folder / 'distill' / 'model'}: {summary['kept']}; {summary['reason']}")
    print(f"next: moe-edge export {folder / 'distill' / 'model'} --target TARGET")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Any checkpoint folder of a supported family; exported as it is.")],
    target: TargetOption = "cpu", config: ConfigOption = None, out: OutOption = None, settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Export a checkpoint to GGUF and ONNX without compressing it; every file is reopened and compared."""
    from moe_edge.api import export_plain

    folder, summary = export_plain(_request(model, target, config, out, None, settings))
    if as_json:
        return _print({"out": str(folder), **summary})
    for row in summary["artifacts"]:
        print(f"{folder / row['path']}  {row['bytes'] / 2**20:.1f} MiB  {row['bits_per_weight']} bits/weight")


@app.command()
def validate(
    artifact: Annotated[Path, typer.Argument(help="A .gguf file, an ONNX folder or a checkpoint folder.")],
    teacher: Annotated[str, typer.Option("--teacher", help="The model it is compared with.")],
    target: TargetOption = "cpu", config: ConfigOption = None, out: OutOption = None, device: DeviceOption = None,
    settings: SetOption = None,
) -> None:  # fmt: skip
    """Compare an artifact with its teacher on held-out text and measure its speed."""
    _refuse_bad_headers(artifact)
    from moe_edge.api import inspect_teacher, resolve
    from moe_edge.stages.validate import validate_artifact

    request = _request(teacher, target, config, out, device, settings)
    resolved = resolve(request)
    result = validate_artifact(artifact, inspect_teacher(resolved)[0], resolved, _beside(artifact, out, "validate"))
    _print(result)
    if result.get("verdict") != "pass":
        raise GateFailed("the artifact missed its gates", where=str(artifact))


@app.command()
def bench(
    artifact: Annotated[Path, typer.Argument(help="A .gguf file, an ONNX folder or a checkpoint folder.")],
    device: Annotated[str, typer.Option("--device", help="local (ssh:// and adb: are not supported yet).")] = "local",
    target: TargetOption = "cpu", out: OutOption = None, settings: SetOption = None,
) -> None:  # fmt: skip
    """Measure an artifact's speed and memory in a fresh process."""
    _refuse_bad_headers(artifact)
    from moe_edge.api import resolve
    from moe_edge.stages.validate import bench_artifact

    resolved = resolve(_request(None, target, None, out, device, settings))
    _print(bench_artifact(artifact, resolved, _beside(artifact, out, "bench")))


def _refuse_bad_headers(artifact: Path) -> None:
    """Before anything heavy is imported: a crafted file is refused in a moment."""
    from moe_edge.devices.detect import refuse_bad_headers

    refuse_bad_headers(artifact)


def _beside(artifact: Path, out: Path | None, what: str) -> Path:
    """--out, or runs/<artifact>-<what>."""
    folder = out if out is not None else Path("runs") / f"{artifact.name}-{what}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A build's output folder.")], as_json: JsonOption = False) -> None:
    """Write the report of a finished build again and print it."""
    from moe_edge.api import rewrite_report

    result = rewrite_report(run)
    _print(result) if as_json else print((run / "report.md").read_text())


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="A build's folder, a device bundle or a bundle's .tar.")]) -> None:
    """Check every file against the manifest: its sha256, nothing missing, nothing extra, sane headers."""
    from moe_edge.export.verification import faults

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
