"""Where distillation's rows come from and what the teacher says of them: the profile's cache, a capture that the user made
(`moe-edge logits capture`), or one of other text that is made now.

Shape suffixes: N rows, S tokens of a row.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.plan import Plan
from moe_edge.distillation.capture import CaptureConfig, RowEncoder, captured_signal
from moe_edge.distillation.capture_cost import capture_cost
from moe_edge.distillation.expert_layers import expert_layer_cka, write_expert_layer_table
from moe_edge.distillation.readers import LogitReader
from moe_edge.distillation.schedule import HELD_OUT_SHARE
from moe_edge.distillation.signal import CachedSignal
from moe_edge.models.loading import load_model, load_tokenizer
from moe_edge.process.ranks import current_ranks
from moe_edge.storage.logit_shards import CAPTURE, ROWS
from moe_edge.storage.rows import TokenRows
from moe_edge.texts.named_text import CALIBRATION, text_rows

log = logging.getLogger(__name__)
CAPTURED = "logits"
MEASURED_ROWS = 8  # on which layer maps and groups of experts are found


@contextmanager
def rows_and_signal(context: StageContext) -> Iterator[tuple[TokenRows, CachedSignal]]:
    """The rows to distil on and the teacher's cached word on them.

    Other text is captured into `distill/logits` before training, resumable, and the capture is dropped at the end; one that
    is to be used again is made beforehand and named as the data.

    Raises:
        ConfigError, InputRejected: no such text, or too little of it; the cache belongs to another teacher.
    """
    rows, signal = _calibration(context) if context.config.distill.data == CALIBRATION else captured_text(context)
    try:
        yield rows, signal
    finally:
        signal.close()


def _calibration(context: StageContext) -> tuple[TokenRows, CachedSignal]:
    profile = context.inputs["profile"]
    rows = TokenRows.load(profile / "rows.safetensors")
    identity = {"teacher": context.teacher_digest, "calibration": rows.digest}
    return rows, CachedSignal(profile / "logits.h5", identity)


def captured_text(context: StageContext) -> tuple[TokenRows, CachedSignal]:
    """Rows of the wanted text in the teacher's tokens and a capture of them: the user's own, or one made now."""
    given = Path(context.config.distill.data).expanduser()
    if is_capture(given):
        return TokenRows.load(given / ROWS), CachedSignal(given, {"teacher": context.teacher_digest})
    rows, logits = wanted_rows(context, context.teacher), context.config.profile.logits
    config = CaptureConfig(k=logits.k, temperatures=tuple(logits.temperatures))

    def price(reader: LogitReader, encoder: RowEncoder, pins: dict[str, Any]) -> None:
        log.info("%s", capture_cost(reader, encoder, context.teacher, pins, rows.ids_NS[0]).text())

    captured = partial(captured_signal, context.teacher, rows, context.out / CAPTURED, config, on_open=price)
    ranks = current_ranks()
    if ranks.world > 1:
        ranks.lead(lambda: captured().close())  # made by one; then each finds it whole
    return rows, captured()


def is_capture(data: Path) -> bool:
    """Is this the folder of a `moe-edge logits capture`?"""
    return (data / CAPTURE).is_file()


def wanted_rows(context: StageContext, model: Path) -> TokenRows:
    """Rows in a model's tokens: as many as all stages want together, and what is held out."""
    config = context.config
    tokens = math.ceil(config.distill.tokens / (1 - HELD_OUT_SHARE))
    length, seed = config.calibration.sequence_length, config.distill.seed
    return text_rows(config.distill.data, load_tokenizer(model), tokens, length, seed)


def term_material(context: StageContext, student: PreTrainedModel, rows: TokenRows) -> dict[str, Any]:
    """What losses on a compressed student know beforehand: see `TermContext`."""
    plan, tokenizer = Plan.read(context.inputs["plan"] / "plan.json"), load_tokenizer(context.teacher)
    known = {"kept": plan.kept if plan.prunes else None, "tokenizers": (tokenizer, tokenizer)}
    return known | measured_material(context, student, rows)


def measured_material(context: StageContext, student: PreTrainedModel, rows: TokenRows) -> dict[str, Any]:
    """The part of it that is measured, on the first rows.

    The table of expert-to-layer CKA is measured only where a stage chooses experts by it, and stands in `expert_layers.json`.
    """
    ids_NS = torch.from_numpy(rows.ids_NS[:MEASURED_ROWS]).long()
    material: dict[str, Any] = {"ids_NS": ids_NS}
    stages = context.config.distill.stages
    if any(stage.losses.get("expert_cka") and stage.expert_share < 1 for stage in stages):
        teacher = load_model(context.teacher).to(next(student.parameters()).device)
        table = expert_layer_cka(teacher, student, ids_NS)
        if current_ranks().leads:
            write_expert_layer_table(context.out / "expert_layers.json", teacher, table, ids_NS.numel())
        material["expert_layer_cka"] = table
    return material
