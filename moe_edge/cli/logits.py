"""`moe-edge logits`: a teacher's logits on any text, captured once, priced beforehand, exchanged with other tools."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_edge.contracts.errors import ConfigError

logits = typer.Typer(no_args_is_help=True, help="Capture a teacher's logits for distillation; export and import them.")

Teacher = Annotated[str, typer.Argument(help="A checkpoint folder or hub id.")]
Data = Annotated[
    str,
    typer.Option(
        "--data", help="calibration | a path (.yaml recipe, .jsonl, .json, text) | datasets:ID[:CONFIG[:SPLIT]]."
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="How many tokens of it.")]
KeptIds = Annotated[int, typer.Option("--k", min=1, help="Ids kept per token.")]
Temperatures = Annotated[
    str | None,
    typer.Option("--temperatures", help="Those with an exact tail mass, default 1,1.5,2; with --rs one, default 1."),
]
RandomDraws = Annotated[
    int, typer.Option("--rs", min=0, help="Keep so many random draws per token instead of the top-k (forward KL only).")
]
RowTokens = Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens of a row.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the order of documents, and of the draws.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Of the teacher's computation: auto | float32 | bfloat16.")]
ShardRows = Annotated[int, typer.Option("--shard-rows", min=1, help="Rows of a shard, the unit that a kill can cost.")]
Json = Annotated[bool, typer.Option("--json", help="Only JSON on stdout.")]


def _request(
    teacher: str,
    data: str,
    tokens: int,
    k: int,
    temperatures: str | None,
    rs: int,
    sequence_length: int,
    seed: int,
    dtype: str,
    shard_rows: int,
) -> Any:
    from moe_edge.distillation.capture import CaptureConfig
    from moe_edge.distillation.capture_run import CaptureRequest
    from moe_edge.models.loading import hashed, read_checkpoint, resolve_teacher

    wanted = _temperatures(temperatures or ("1" if rs else "1,1.5,2"))
    config = CaptureConfig(k, wanted, rs, seed, shard_rows, dtype)
    opened = hashed(read_checkpoint(resolve_teacher(teacher)))
    return CaptureRequest(opened, data, tokens, config, sequence_length, seed)


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError("--temperatures are numbers with commas between", where=text, why=str(error)) from error


@logits.command()
def capture(
    teacher: Teacher,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the cache.")],
    data: Data = "calibration",
    tokens: Tokens = 65536,
    k: KeptIds = 32,
    temperatures: Temperatures = None,
    rs: RandomDraws = 0,
    sequence_length: RowTokens = 512,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    shard_rows: ShardRows = 64,
    as_json: Json = False,
) -> None:
    """Run TEACHER over a text and keep what distillation needs; goes on where a killed run stopped.

    Several processes share the work: accelerate launch --num_processes N -m moe_edge logits capture ...
    """
    from moe_edge.distillation.capture_run import capture as run
    from moe_edge.pipeline import locked

    request = _request(teacher, data, tokens, k, temperatures, rs, sequence_length, seed, dtype, shard_rows)
    with locked(out):
        summary = run(request, out)
    if summary and as_json:
        print(json.dumps(summary, indent=1))
    elif summary:
        print(
            f"{out}: {summary['rows']} rows, {summary['tokens']:,} tokens, {summary['bytes_per_token']} bytes per token"
        )


@logits.command()
def estimate(
    teacher: Teacher,
    data: Data = "calibration",
    tokens: Tokens = 65536,
    k: KeptIds = 32,
    temperatures: Temperatures = None,
    rs: RandomDraws = 0,
    sequence_length: RowTokens = 512,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    shard_rows: ShardRows = 64,
    as_json: Json = False,
) -> None:
    """Say what a capture would cost: bytes, hours from one measured row, and the memory of a live teacher instead."""
    from moe_edge.distillation.capture_run import estimate as run

    request = _request(teacher, data, tokens, k, temperatures, rs, sequence_length, seed, dtype, shard_rows)
    with tempfile.TemporaryDirectory(prefix="moe-edge-") as scratch:
        cost = run(request, Path(scratch))
    print(json.dumps(cost.to_dict(), indent=1) if as_json else cost.text())


@logits.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A capture's folder, or the profile folder of a build.")],
    out: Annotated[Path, typer.Argument(help="The HDF5 file to write: values float16, indices int32, input_ids.")],
) -> None:
    """Write a cache in the plain layout that other tools read."""
    from moe_edge.distillation.capture_exchange import export_plain_logits

    print(json.dumps(export_plain_logits(folder, out), indent=1))


@logits.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="An HDF5 file with values and indices [rows, tokens, k].")],
    out: Annotated[Path, typer.Argument(help="Folder of the cache to make.")],
    teacher: Annotated[str, typer.Option("--teacher", help="The model that the logits are of.")],
    rows: Annotated[
        Path | None, typer.Option("--rows", help="A rows.safetensors, where the file has no input_ids.")
    ] = None,
    shard_rows: ShardRows = 64,
) -> None:
    """Make a cache from another tool's file; without tail masses only the kept ids are compared."""
    from moe_edge.distillation.capture_exchange import import_plain_logits
    from moe_edge.models.loading import hashed, read_checkpoint, resolve_teacher
    from moe_edge.pipeline import locked

    with locked(out):
        opened = hashed(read_checkpoint(resolve_teacher(teacher)))
        print(json.dumps(import_plain_logits(file, opened, out, rows, shard_rows), indent=1))
