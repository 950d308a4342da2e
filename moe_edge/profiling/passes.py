"""One pass of the teacher over the calibration rows, in shards that survive a kill.

After every shard the running sums are saved; the next run goes on behind the last whole shard and ends with
bit-identical statistics, because sums and batch borders are the same. Logits are handed out row by row while the
pass runs; rows of the shard in which a run was killed are handed out again.

Shape suffixes: N rows, S tokens of a row, V vocabulary, D model width, B rows of a batch.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.progress import track
from moe_edge.families.taps import body, head
from moe_edge.profiling.observers import Batch, Block, add_layer_similarity, column_squares, observing
from moe_edge.profiling.sums import IMATRIX, Sums, new_sums, sizes_of
from moe_edge.storage.statistics import load_tensors, save_tensors

log = logging.getLogger(__name__)
BATCH_ROWS = 4
SHARD_ROWS = 8  # a whole number of batches
BLOCK_TOKENS = 256  # n of the minibatch HSIC
STATE = "sums.safetensors"

OnLogits = Callable[[np.ndarray, Tensor], None]  # a row's ids [S] and the teacher's logits [S, V]


def run_pass(
    model: PreTrainedModel,
    ids_NS: np.ndarray,
    *,
    cka_tokens: int,
    partial: Path,
    identity: dict[str, Any],
    on_logits: OnLogits | None = None,
) -> Sums:
    """Read every row once and return the sums.

    Args:
        ids_NS: packed rows, no padding.
        cka_tokens: tokens that run through every expert, in blocks of 256 spread over the rows.
        partial: folder of the saved state; the caller deletes it when it has stored the results.
        identity: what the sums depend on; a state of another identity is not resumed.
        on_logits: sees every row's logits, in the order of the rows.
    """
    partial.mkdir(parents=True, exist_ok=True)
    blocks = cka_blocks(*ids_NS.shape, cka_tokens)
    sums, done = _resume(model, partial, identity)
    starts = range(done, len(ids_NS), SHARD_ROWS)
    for start in track(starts, "profiling", total=len(starts)):
        shard = range(start, min(start + SHARD_ROWS, len(ids_NS)))
        _read_shard(model, ids_NS, shard, blocks, sums, on_logits)
        save_tensors(partial / STATE, sums, {"identity": identity, "rows": shard.stop})
    return sums


def _resume(model: PreTrainedModel, partial: Path, identity: dict[str, Any]) -> tuple[Sums, int]:
    """The saved sums and how many rows they hold, or zeros."""
    path = partial / STATE
    if path.is_file():
        try:
            sums, header = load_tensors(path)
        except InputRejected:
            sums, header = {}, {}
        if header.get("identity") == identity:
            log.info("resuming behind row %d", header["rows"])
            return {name: tensor.to(model.device) for name, tensor in sums.items()}, header["rows"]
    return new_sums(sizes_of(model), model.device), 0


def _read_shard(
    model: PreTrainedModel,
    ids_NS: np.ndarray,
    shard: range,
    blocks: dict[int, list[range]],
    sums: Sums,
    on_logits: OnLogits | None,
) -> None:
    batch = Batch()
    with torch.inference_mode(), observing(model, sums, batch):
        for start in range(shard.start, shard.stop, BATCH_ROWS):
            rows = range(start, min(start + BATCH_ROWS, shard.stop))
            batch.blocks = _blocks_of(rows, blocks, ids_NS.shape[1], model.device)
            _read_batch(model, ids_NS[rows.start : rows.stop], batch, sums, on_logits)


def _read_batch(
    model: PreTrainedModel, ids_BS: np.ndarray, batch: Batch, sums: Sums, on_logits: OnLogits | None
) -> None:
    """One forward; the logits are made row by row, because a batch of them would be the largest tensor of all."""
    input_BS = torch.from_numpy(ids_BS).long().to(model.device)
    hidden_BSD = body(model)(input_ids=input_BS, use_cache=False).last_hidden_state
    add_layer_similarity(batch, sums)
    sums["tokens"] += ids_BS.size
    sums[IMATRIX + "head_in"] += column_squares(hidden_BSD.flatten(0, 1))
    if on_logits is not None:
        for ids_S, hidden_SD in zip(ids_BS, hidden_BSD, strict=True):
            on_logits(ids_S, head(model)(hidden_SD))


def cka_blocks(rows: int, row_tokens: int, cka_tokens: int) -> dict[int, list[range]]:
    """Row -> token ranges of the CKA blocks: evenly over the rows, walking through the rows' parts.

    Blocks have 256 tokens, or a whole row (or all `cka_tokens`) where that is less; never more than the rows hold.
    """
    size = min(BLOCK_TOKENS, row_tokens, cka_tokens)
    if size == 0:
        return {}
    parts = row_tokens // size
    count = min(cka_tokens // size, rows * parts)
    blocks: dict[int, list[range]] = {}
    for number in range(count):
        start = number % parts * size
        blocks.setdefault(number * rows // count, []).append(range(start, start + size))
    return blocks


def _blocks_of(rows: range, blocks: dict[int, list[range]], row_tokens: int, device: torch.device) -> list[Block]:
    """The blocks that lie in a batch of `rows`, as indices into the flattened batch."""
    found = []
    for offset, row in enumerate(rows):
        for part in blocks.get(row, []):
            position_N = torch.arange(part.start, part.stop, device=device)
            found.append(Block(position_N + offset * row_tokens, position_N))
    return found
