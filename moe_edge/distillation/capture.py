"""Capturing a teacher's logits on any rows into a folder of shards (storage/logit_shards.py), resumable and in parallel.

What a shard holds depends on its rows, the teacher and the settings alone: random draws are seeded by the row's own
tokens, batches never cross a shard. So one process, several, and one that was killed in between write the same bytes.

The caller brings the rows (profiling makes them from text) and says which of the missing shards are this process's.

Shape suffixes: N rows, S tokens of a row, V vocabulary.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.readers import LogitReader, StreamedReader, WholeReader
from moe_edge.distillation.signal import CachedSignal
from moe_edge.distillation.teacher import own_dtype
from moe_edge.formulas.divergence import teacher_topk
from moe_edge.formulas.sampling import draw
from moe_edge.models.loading import load_tokenizer, true_vocabulary
from moe_edge.process.placement import fits_in_memory
from moe_edge.process.progress import track
from moe_edge.storage.checkpoint import tokenizer_files
from moe_edge.storage.files import sha256_file
from moe_edge.storage.logit_codec import RowCodec
from moe_edge.storage.logit_file import Codec
from moe_edge.storage.logit_shards import (
    SHARDS_SCHEMA,
    Pins,
    begin_capture,
    finish_capture,
    shard_span,
    write_shard,
)
from moe_edge.storage.rows import TokenRows, row_key
from moe_edge.storage.sampled_codec import MAX_DRAWS, SampledCodec

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class CaptureConfig:
    """What is kept of the teacher; all of it is pinned.

    `draws` 0: the top-k with exact tails at `temperatures`. Otherwise so many random draws per token, at the one
    temperature given.
    """

    k: int = 32
    temperatures: tuple[float, ...] = (1.0, 1.5, 2.0)
    draws: int = 0
    seed: int = 0
    shard_rows: int = 64
    dtype: str = "auto"  # of the teacher's computation: float32 on a CPU, bfloat16 on an accelerator

    def __post_init__(self) -> None:
        """Raises ConfigError for settings that cannot be."""
        if self.draws and len(self.temperatures) != 1:
            raise ConfigError(
                "random draws belong to one temperature",
                where="--rs, --temperatures",
                why=f"{len(self.temperatures)} are given",
                next_command="capture once for each of them, each with its own --out",
            )
        rules = {
            f"draws lie in 0..{MAX_DRAWS}": 0 <= self.draws <= MAX_DRAWS,
            "k and shard rows are positive": self.k > 0 and self.shard_rows > 0,
            "temperatures are positive, and there is one": min(self.temperatures, default=0) > 0,
            f"the dtype is auto, {' or '.join(DTYPES)}": self.dtype in ("auto", *DTYPES),
        }
        if broken := [rule for rule, kept in rules.items() if not kept]:
            raise ConfigError("impossible settings of a capture", where=str(self), why="; ".join(broken))


class RowEncoder(Protocol):
    """Turns logits into records."""

    def record(self, ids_S: np.ndarray, logits_SV: Tensor) -> bytes:
        """What is kept of the logits of a row with these tokens."""

    def codec(self, records: Sequence[bytes]) -> Codec:
        """The codec of a shard with these records."""


class TopKEncoder:
    """Keeps the k best log-probabilities and the exact mass of everything else at each temperature."""

    def __init__(self, config: CaptureConfig, tokens: int, vocab: int) -> None:
        temperatures = tuple(sorted({1.0, *config.temperatures}))
        self._codec = RowCodec(tokens, min(config.k, vocab), vocab, temperatures)

    def record(self, ids_S: np.ndarray, logits_SV: Tensor) -> bytes:
        top = teacher_topk(logits_SV, self._codec.k, self._codec.temperatures)
        return self._codec.encode(*(column.cpu().numpy() for column in top))

    def codec(self, records: Sequence[bytes]) -> Codec:
        return self._codec


class SampledEncoder:
    """Keeps random draws, seeded by the row's own tokens: the same row gives the same record in any order."""

    def __init__(self, config: CaptureConfig, tokens: int, vocab: int) -> None:
        self._config, self._shape = config, (tokens, config.draws, vocab, config.temperatures[0])

    def record(self, ids_S: np.ndarray, logits_SV: Tensor) -> bytes:
        seed = hashlib.sha256(f"{self._config.seed}".encode() + row_key(ids_S)).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        drawn = draw(logits_SV, self._config.draws, self._config.temperatures[0], generator)
        return SampledCodec(*self._shape, row_bytes=0).encode(*(column.cpu().numpy() for column in drawn))

    def codec(self, records: Sequence[bytes]) -> Codec:
        return SampledCodec(*self._shape, row_bytes=max(map(len, records)))


def encoder_of(config: CaptureConfig, tokens: int, vocab: int) -> RowEncoder:
    """The encoder for rows of `tokens` tokens of a true vocabulary."""
    return (SampledEncoder if config.draws else TopKEncoder)(config, tokens, vocab)


def pins_of(teacher: Teacher, rows: TokenRows, config: CaptureConfig, device: torch.device) -> dict[str, Any]:
    """Everything that a capture depends on, as plain data.

    `vocab` is the true vocabulary: the ids that the tokenizer can produce, not the head's padded rows.

    Raises:
        InputRejected: the teacher's tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(teacher.path)
    files = "".join(sha256_file(path) for path in tokenizer_files(teacher.path))
    template = tokenizer.chat_template or ""
    kept: dict[str, Any] = {"k": config.k, "temperatures": sorted({1.0, *config.temperatures})}
    if config.draws:
        kept = {"draws": config.draws, "temperatures": list(config.temperatures), "seed": config.seed}
    return kept | {
        "schema": SHARDS_SCHEMA,
        "coding": "draws, counts u8" if config.draws else "gaps u8, exact tails f16",
        "teacher": teacher.digest,
        "tokenizer": hashlib.sha256(files.encode()).hexdigest(),
        "chat_template": hashlib.sha256(str(template).encode()).hexdigest(),
        "vocab": true_vocabulary(tokenizer, teacher.spec.vocab),
        "rows": rows.digest,
        "row_count": len(rows.ids_NS),
        "sequence_length": int(rows.ids_NS.shape[1]),
        "shard_rows": config.shard_rows,
        "dtype": resolved_dtype(config.dtype, device),
    }


def resolved_dtype(dtype: str, device: torch.device) -> str:
    """The name of the dtype that a teacher computes in on this device, where `dtype` may be `auto`."""
    return dtype if dtype != "auto" else str(own_dtype(device)).removeprefix("torch.")


def open_reader(teacher: Teacher, pins: Pins, device: torch.device, scratch: Path, sharers: int = 1) -> LogitReader:
    """The teacher whole where it fits into memory, else layer by layer.

    Args:
        scratch: folder for what a streamed teacher spills.
        sharers: processes of this machine that do the same.
    """
    dtype = DTYPES[pins["dtype"]]
    if fits_in_memory(teacher.headers, dtype, device, sharers):
        return WholeReader(teacher.path, dtype, device, pins["vocab"])
    return StreamedReader(teacher.path, dtype, device, pins["vocab"], scratch)


def capture_shards(
    reader: LogitReader, encoder: RowEncoder, folder: Path, pins: Pins, ids_NS: np.ndarray, shards: Sequence[int]
) -> None:
    """Write these shards; each is on the disk under its name before the next is begun."""
    together = max(1, reader.group_rows(ids_NS.shape[1]) // pins["shard_rows"])
    parts = {number: ids_NS[list(shard_span(pins, number, len(ids_NS)))] for number in shards}
    logits: Iterator[Tensor] = iter(())
    for place, number in enumerate(track(shards, "capturing logits, shards")):
        if place % together == 0:
            logits = reader.logits([parts[other] for other in shards[place : place + together]])
        records = [encoder.record(ids_S, next(logits)) for ids_S in parts[number]]
        write_shard(folder, pins, number, encoder.codec(records), list(parts[number]), records)


def captured_signal(
    teacher: Teacher,
    rows: TokenRows,
    out: Path,
    config: CaptureConfig | None = None,
    device: str | None = None,
    on_open: Callable[[LogitReader, RowEncoder, dict[str, Any]], None] | None = None,
) -> CachedSignal:
    """The teacher's signal on these rows from the folder `out`: captured there now, unless it already is.

    A killed capture goes on with the missing shards. The signal is what the profile's cache gives too; close it.

    Args:
        on_open: called with the teacher and the pins before the first shard, for example to price the capture.

    Raises:
        InputRejected: `out` holds another capture; the pins that differ are named.
    """
    config = config or CaptureConfig()
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pins = pins_of(teacher, rows, config, place)
    missing = begin_capture(out, pins, rows)
    if missing:
        encoder = encoder_of(config, rows.ids_NS.shape[1], pins["vocab"])
        with open_reader(teacher, pins, place, out) as reader:
            if on_open is not None:
                on_open(reader, encoder, pins)
            capture_shards(reader, encoder, out, pins, rows.ids_NS, missing)
    if missing or not (out / "manifest.json").is_file():
        finish_capture(out, pins, {"tokens": rows.n_tokens})
    return CachedSignal(out, pins)
