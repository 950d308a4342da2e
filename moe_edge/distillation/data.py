"""What a distillation reads: rows of text with the teacher's cached word on them, and what its losses are built from.

The word comes from the profile's cache, from a capture that the user made (`moe-edge logits capture`), or from one of other text
that is made now.

Shape suffixes: N rows, S tokens of a row.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_edge.contracts.artifacts import ProfileFolder
from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.config import BuildConfig, StageConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.plan import KeptExperts
from moe_edge.contracts.row_split import HELD_OUT_SHARE, RowSplit
from moe_edge.distillation.capture import CaptureConfig, RowEncoder, captured_signal
from moe_edge.distillation.capture_cost import capture_cost
from moe_edge.distillation.expert_layers import expert_layer_cka, write_expert_layer_table
from moe_edge.distillation.readers import LogitReader
from moe_edge.distillation.signal import CachedSignal
from moe_edge.distillation.teacher import reference_teacher
from moe_edge.distillation.terms import TermInputs
from moe_edge.models.loading import load_tokenizer
from moe_edge.process.ranks import current_ranks
from moe_edge.storage.logit_shards import CAPTURE, ROWS, Pins
from moe_edge.storage.rows import TokenRows
from moe_edge.texts.named_text import CALIBRATION, text_rows

log = logging.getLogger(__name__)
CAPTURED = "logits"  # in the stage's folder: a capture of other text, dropped at the end
MEASURED_ROWS = 8  # on which layer maps and groups of experts are found


@contextmanager
def rows_and_signal(
    config: BuildConfig, teacher: Teacher, out: Path, profile: ProfileFolder | None = None
) -> Iterator[tuple[TokenRows, CachedSignal]]:
    """The rows to distil on, in the teacher's tokens, and the teacher's cached word on them.

    Other text is captured into `out` before training, resumable, and the capture is dropped at the end; one that is to be
    used again is made beforehand and named as the data.

    Args:
        profile: holds both for the calibration text; None: that is captured like any other.

    Raises:
        ConfigError, InputRejected: no such text, or too little of it; the cache belongs to another teacher.
    """
    if profile is not None and config.distill.data == CALIBRATION:
        rows, signal = _profiled(profile, teacher)
    else:
        rows, signal = _captured(config, teacher, out)
    try:
        yield rows, signal
    finally:
        signal.close()


def _profiled(profile: ProfileFolder, teacher: Teacher) -> tuple[TokenRows, CachedSignal]:
    rows = TokenRows.load(profile.rows)
    return rows, CachedSignal(profile.logits, {"teacher": teacher.digest, "calibration": rows.digest})


def _captured(config: BuildConfig, teacher: Teacher, out: Path) -> tuple[TokenRows, CachedSignal]:
    """The user's own capture, or one made now."""
    given = Path(config.distill.data).expanduser()
    if is_capture(given):
        return TokenRows.load(given / ROWS), CachedSignal(given, {"teacher": teacher.digest})
    rows, logits = wanted_rows(config, teacher.path), config.profile.logits
    settings = CaptureConfig(k=logits.k, temperatures=tuple(logits.temperatures))

    def log_cost(reader: LogitReader, encoder: RowEncoder, pins: Pins) -> None:
        log.info("%s", capture_cost(reader, encoder, teacher.headers, pins, rows.ids_NS[0]).text())

    captured = partial(captured_signal, teacher, rows, out / CAPTURED, settings, on_open=log_cost)
    ranks = current_ranks()
    if ranks.world > 1:
        ranks.lead(lambda: captured().close())  # made by one; then each finds it whole
    return rows, captured()


def rows_across(config: BuildConfig, student: Path) -> TokenRows:
    """Rows in the tokens of a student whose tokenizer is not the teacher's.

    Raises:
        ConfigError: a capture is named, which holds the teacher's tokens; no such text, or too little of it.
    """
    data = config.distill.data
    if is_capture(Path(data).expanduser()):
        why = "a capture holds the teacher's tokens, and the student has others"
        raise ConfigError("a capture cannot teach this student", where=f"distill.data: {data}", why=why)
    return wanted_rows(config, student)


def is_capture(data: Path) -> bool:
    """Is this the folder of a `moe-edge logits capture`?"""
    return (data / CAPTURE).is_file()


def wanted_rows(config: BuildConfig, model: Path) -> TokenRows:
    """Rows in a model's tokens: as many as all stages want together, and what is held out."""
    tokens = math.ceil(config.distill.tokens / (1 - HELD_OUT_SHARE))
    length, seed = config.calibration.sequence_length, config.distill.seed
    return text_rows(config.distill.data, load_tokenizer(model), tokens, length, seed)


def term_inputs(
    stages: Sequence[StageConfig],
    teacher: Path,
    student: PreTrainedModel,
    rows: TokenRows,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    kept: KeptExperts | None,
    out: Path,
) -> TermInputs:
    """What the losses of the stages are built from; what is measured is measured on the first training rows.

    The table of expert-to-layer CKA is measured only where a stage chooses experts by it, and stands in `expert_layers.json`.
    """
    unseen = RowSplit(*rows.ids_NS.shape).held_out().start
    ids_NS = torch.from_numpy(rows.ids_NS[: min(MEASURED_ROWS, unseen)]).long()
    table = None
    if any(stage.losses.get("expert_cka") and stage.expert_share < 1 for stage in stages):
        model = reference_teacher(teacher, next(student.parameters()).device)
        table = expert_layer_cka(model, student, ids_NS)
        if current_ranks().leads:
            write_expert_layer_table(out / "expert_layers.json", model, table, ids_NS.numel())
    return TermInputs(kept, ids_NS, table, tokenizers)
