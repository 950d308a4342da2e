"""The commands `moe-edge logits export` and `import`: our cache to and from the plain layout of other tools' scripts.

Shape suffixes: N rows, S tokens of a row.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_edge.contracts.artifacts import ProfileFolder
from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.distillation.capture import CaptureConfig, pins_of
from moe_edge.storage.logit_codec import RowCodec, TeacherRow
from moe_edge.storage.logit_shards import (
    Pins,
    ShardedLogits,
    begin_capture,
    finish_capture,
    shard_span,
    write_shard,
)
from moe_edge.storage.logits import LogitCache
from moe_edge.storage.plain_logits import PlainLogits, write_plain
from moe_edge.storage.rows import TokenRows

NO_TAIL = "missing: losses compare teacher and student given that the token is one of the kept ids"


def export_plain_logits(folder: Path, out: Path) -> dict[str, Any]:
    """Write a capture's folder, or a build's profile folder, as one plain HDF5 file; returns what is in it.

    Raises:
        InputRejected: no cache, a damaged one, or one of random draws.
    """
    cache, ids_NS = _open(folder)
    with cache:
        if not isinstance(codec := cache.codec, RowCodec):
            raise InputRejected("random draws have no plain layout", where=str(folder), why="expected a top-k")

        def rows() -> Iterator[tuple[np.ndarray, TeacherRow]]:
            for ids_S in ids_NS:
                row = cache.row(ids_S)
                assert isinstance(row, TeacherRow)
                yield ids_S, row

        write_plain(out, codec, rows(), len(ids_NS))
    return {"out": str(out), "rows": len(ids_NS), "k": codec.k, "bytes": out.stat().st_size}


def _open(folder: Path) -> tuple[ShardedLogits | LogitCache, np.ndarray]:
    if (folder / ProfileFolder.LOGITS).is_file():
        return LogitCache(folder / ProfileFolder.LOGITS), TokenRows.load(folder / ProfileFolder.ROWS).ids_NS
    cache = ShardedLogits(folder)
    return cache, cache.rows.ids_NS


def import_plain_logits(
    path: Path, teacher: Teacher, out: Path, rows_file: Path | None = None, shard_rows: int = CaptureConfig.shard_rows
) -> dict[str, Any]:
    """Make a capture's folder from a plain file; without tail masses the manifest says that the tail is missing.

    Args:
        teacher: the model that the logits are of; its digest and tokenizer are pinned.
        rows_file: a rows.safetensors with the tokens, for a file without `input_ids`.

    Raises:
        ConfigError: no tokens at all.
        InputRejected: not a plain file, damaged, of another vocabulary, or it does not fit the rows.
    """
    with PlainLogits(path) as plain:
        rows = _rows_of(plain, rows_file)
        pins = _pins(plain, teacher, rows, shard_rows)
        codec = RowCodec(plain.shape[1], plain.shape[2], pins["vocab"], plain.temperatures)
        for number in begin_capture(out, pins, rows):
            span = shard_span(pins, number, len(rows.ids_NS))
            write_shard(
                out, pins, number, codec, list(rows.ids_NS[list(span)]), [_record(plain, codec, n) for n in span]
            )
    finish_capture(out, pins, {"tokens": rows.n_tokens, "imported_from": path.name, "tail": pins["tail"]})
    return {"out": str(out), "rows": len(rows.ids_NS), "k": codec.k, "tail": pins["tail"]}


def _pins(plain: PlainLogits, teacher: Teacher, rows: TokenRows, shard_rows: int) -> Pins:
    config = CaptureConfig(k=plain.shape[2], shard_rows=shard_rows)
    tail = "exact" if plain.temperatures else NO_TAIL
    imported = {
        "coding": "imported, gaps u8",
        "dtype": "imported",
        "temperatures": list(plain.temperatures),
        "tail": tail,
    }
    return pins_of(teacher, rows, config, torch.device("cpu")) | imported


def _rows_of(plain: PlainLogits, rows_file: Path | None) -> TokenRows:
    if rows_file is not None:
        rows = TokenRows.load(rows_file)
    elif plain.ids_NS is not None:
        rows = TokenRows(plain.ids_NS, plain.ids_NS.size)
    else:
        why = "it has no data set 'input_ids', and a row of logits belongs to one row of tokens"
        command = "give the tokens with --rows rows.safetensors"
        raise ConfigError("the tokens are missing", where=str(plain.path), why=why, next_command=command)
    if rows.ids_NS.shape != plain.shape[:2]:
        why = f"rows of tokens {rows.ids_NS.shape}, rows of logits {plain.shape[:2]}"
        raise InputRejected("tokens and logits do not fit together", where=str(rows_file or plain.path), why=why)
    return rows


def _record(plain: PlainLogits, codec: RowCodec, number: int) -> bytes:
    try:
        return codec.encode(*plain.row(number))
    except ValueError as error:
        raise InputRejected("a row cannot be imported", where=f"{plain.path}, row {number}", why=str(error)) from error
