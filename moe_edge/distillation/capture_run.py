"""The commands `moe-edge logits capture` and `estimate`: a logit cache of any text outside a build, and its price.

Several processes share a capture: `accelerate launch --num_processes N -m moe_edge logits capture ...` starts N equal ones
(process/ranks.py). The leader makes the folder ready, decides which shards are missing, and writes the manifest; each process
captures every N-th of the missing shards.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_edge.contracts.checkpoint import Teacher
from moe_edge.distillation.capture import CaptureConfig, capture_shards, encoder_of, open_reader, pins_of
from moe_edge.distillation.capture_cost import CaptureCost, capture_cost
from moe_edge.models.loading import load_tokenizer
from moe_edge.process.placement import compute_device
from moe_edge.process.ranks import current_ranks
from moe_edge.storage.logit_shards import begin_capture, finish_capture
from moe_edge.storage.rows import TokenRows
from moe_edge.texts.named_text import text_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptureRequest:
    """What the user asked for."""

    teacher: Teacher
    data: str  # calibration | a path | datasets:ID[:CONFIG[:SPLIT]]
    tokens: int
    config: CaptureConfig
    sequence_length: int = 512
    seed: int = 0  # of the order of documents

    def rows(self) -> TokenRows:
        tokenizer = load_tokenizer(self.teacher.path)
        return text_rows(self.data, tokenizer, self.tokens, self.sequence_length, self.seed)


def estimate(request: CaptureRequest, scratch: Path) -> CaptureCost:
    """What the capture would cost, from one forward of its first row."""
    rows, device = request.rows(), compute_device()
    pins = pins_of(request.teacher, rows, request.config, device)
    encoder = encoder_of(request.config, pins["sequence_length"], pins["vocab"])
    with open_reader(request.teacher, pins, device, scratch) as reader:
        return capture_cost(reader, encoder, request.teacher.headers, pins, rows.ids_NS[0])


def capture(request: CaptureRequest, out: Path) -> dict[str, Any]:
    """Capture into `out`, or go on where a killed run stopped; returns the summary.

    Raises:
        InputRejected: `out` holds another capture; the pins that differ are named.
    """
    ranks, device = current_ranks(), compute_device()
    rows = request.rows()
    pins = pins_of(request.teacher, rows, request.config, device)
    missing = ranks.share(begin_capture(out, pins, rows) if ranks.leads else [])
    if missing:
        encoder = encoder_of(request.config, pins["sequence_length"], pins["vocab"])
        with open_reader(request.teacher, pins, device, out, ranks.local_world) as reader:
            if ranks.leads:
                cost = capture_cost(reader, encoder, request.teacher.headers, pins, rows.ids_NS[0], ranks.world)
                log.info("%s", cost.text())
            capture_shards(reader, encoder, out, pins, rows.ids_NS, missing[ranks.rank :: ranks.world])
    ranks.wait()
    if not ranks.leads:
        return {}
    manifest = finish_capture(out, pins, {"tokens": rows.n_tokens, "data": request.data})
    size = sum(entry.bytes for entry in manifest.files.values())
    return {
        "out": str(out),
        "tokens": rows.n_tokens,
        "rows": len(rows.ids_NS),
        "shards_written": len(missing),
        "bytes": size,
        "bytes_per_token": round(size / rows.n_tokens, 2),
    }
