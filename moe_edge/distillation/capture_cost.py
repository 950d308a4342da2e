"""What a capture will cost, known before hours are spent: bytes of the cache, hours of the teacher, and the alternative.

The bytes follow from the format; the time comes from one row that really runs through the teacher. The alternative, a
live teacher, holds its weights in memory for as long as the student trains, and runs anew in every epoch.

Shape suffixes: S tokens of a row.
"""

from dataclasses import dataclass

import numpy as np

from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.units import format_bytes
from moe_edge.distillation.capture import DTYPES, RowEncoder
from moe_edge.distillation.readers import LogitReader, StreamedReader
from moe_edge.storage.logit_file import KEY_BYTES
from moe_edge.storage.logit_shards import Pins, shard_count
from moe_edge.storage.sampled_codec import SampledCodec

FILE_BYTES = 6144  # of an HDF5 file without its rows
ID_BYTES = 4  # a token in rows.safetensors


@dataclass(frozen=True)
class CaptureCost:
    """A forecast."""

    tokens: int
    bytes_per_token: float
    bytes_are_a_limit: bool  # True: no row could be encoded, the most that is possible is given
    seconds: float
    processes: int
    layerwise: bool  # the teacher does not fit into memory and is streamed
    live_teacher_bytes: int  # of its weights, in the dtype of the computation
    live_teacher_seconds_per_epoch: float

    @property
    def cache_bytes(self) -> int:
        return round(self.tokens * self.bytes_per_token)

    def to_dict(self) -> dict[str, float | int | bool]:
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {"cache_bytes": self.cache_bytes, "hours": self.seconds / 3600}

    def text(self) -> str:
        """For people, two lines."""
        most = "at most " if self.bytes_are_a_limit else ""
        how = "layer by layer" if self.layerwise else "whole in memory"
        shared = f" in {self.processes} processes" if self.processes > 1 else ""
        return (
            f"capture: {self.tokens:,} tokens x {most}{self.bytes_per_token:.1f} B = {format_bytes(self.cache_bytes)}, "
            f"about {_duration(self.seconds)}{shared} ({self.tokens / self.seconds:,.0f} tokens/s, teacher {how})\n"
            f"a live teacher instead: {format_bytes(self.live_teacher_bytes)} of memory for its weights while the student "
            f"trains, and {_duration(self.live_teacher_seconds_per_epoch)} of forward passes in every epoch"
        )


def _duration(seconds: float) -> str:
    """90 -> '1.5 min'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def capture_cost(
    reader: LogitReader,
    encoder: RowEncoder,
    teacher: CheckpointHeaders,
    pins: Pins,
    ids_S: np.ndarray,
    processes: int = 1,
) -> CaptureCost:
    """The cost of the capture that `pins` describe, from one forward of the row `ids_S`.

    Args:
        processes: how many share the rows, each as fast as this one.
    """
    rows, tokens = pins["row_count"], len(ids_S)
    seconds, logits_SV = reader.trial(ids_S, rows)
    itemsize = DTYPES[pins["dtype"]].itemsize
    record_bytes = len(encoder.record(ids_S, logits_SV)) if logits_SV is not None else _most(encoder, tokens)
    files = shard_count(pins, rows) * FILE_BYTES / (rows * tokens)
    return CaptureCost(
        tokens=rows * tokens,
        bytes_per_token=(record_bytes + KEY_BYTES) / tokens + ID_BYTES + files,
        bytes_are_a_limit=logits_SV is None and "draws" in pins,
        seconds=seconds / processes,
        processes=processes,
        layerwise=isinstance(reader, StreamedReader),
        live_teacher_bytes=itemsize * teacher.weights,
        live_teacher_seconds_per_epoch=seconds,
    )


def _most(encoder: RowEncoder, tokens: int) -> int:
    """Bytes of the longest possible record."""
    codec = encoder.codec([b""])
    if not isinstance(codec, SampledCodec):
        return codec.row_bytes
    ids_SN = np.tile(np.arange(codec.draws), (tokens, 1))
    return len(codec.encode(ids_SN, np.ones_like(ids_SN), np.zeros(tokens, dtype=np.float32)))
