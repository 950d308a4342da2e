"""One pass of the teacher over the calibration rows, in shards that survive a kill.

`Work` says which rows a process reads and where the CKA blocks lie. `run_pass` reads them with the whole model in
memory (layerwise.py: without). After every shard the running sums are saved; the next run goes on behind the last whole
shard and ends with bit-identical statistics, because sums and batch borders are the same. Logits are handed out row by
row while the pass runs; rows of the shard in which a run was killed are handed out again.

Shape suffixes: N rows, S tokens of a row, V vocabulary, D model width, B rows of a batch.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.contracts.errors import InputRejected
from moe_edge.formulas.cka_bootstrap import group_count, group_of
from moe_edge.models.taps import Tap, body, decoder_layers, dense_taps, head
from moe_edge.models.views import MoELayerView, moe_layers
from moe_edge.process.progress import track
from moe_edge.profiling.evidence import Block, layers_similarity
from moe_edge.profiling.observers import Batch, add_weight_sizes, column_squares, observing
from moe_edge.profiling.sums import IMATRIX, PassSums, Sums, layer_sums, model_sums

log = logging.getLogger(__name__)
BATCH_ROWS = 4
SHARD_ROWS = 8  # a whole number of batches
BLOCK_TOKENS = 256  # n of the minibatch HSIC
STATE = "sums.safetensors"

OnLogits = Callable[[np.ndarray, Tensor], None]  # a row's ids [S] and the teacher's logits [S, V]


class Span(NamedTuple):
    """A CKA block in its row."""

    number: int  # among all blocks
    group: int  # of the bootstrap
    tokens: range


@dataclass(frozen=True)
class Work:
    """What a process reads. Batches and blocks depend on the rows alone, never on how many processes share them."""

    ids_NS: np.ndarray  # all packed rows, no padding
    blocks: dict[int, list[Span]]  # row -> its CKA blocks
    shards: list[range]  # the rows of this process

    @property
    def groups(self) -> int:
        return group_count(sum(len(spans) for spans in self.blocks.values()))

    @property
    def rows(self) -> int:
        """How many rows this process reads."""
        return sum(len(shard) for shard in self.shards)

    def batches(self, shard: range) -> Iterator[tuple[range, Tensor]]:
        """(rows, ids [B, S]) of a shard in turn."""
        for start in range(shard.start, shard.stop, BATCH_ROWS):
            rows = range(start, min(start + BATCH_ROWS, shard.stop))
            yield rows, torch.from_numpy(self.ids_NS[rows.start : rows.stop]).long()

    def blocks_of(self, rows: range, device: torch.device | str) -> list[Block]:
        """The blocks that lie in a batch of `rows`, as indices into the flattened batch."""
        found = []
        for offset, row in enumerate(rows):
            for span in self.blocks.get(row, []):
                position_N = torch.arange(span.tokens.start, span.tokens.stop, device=device)
                token_N = position_N + offset * self.ids_NS.shape[1]
                found.append(Block(token_N, position_N, span.number, span.group))
        return found


def share_of(ids_NS: np.ndarray, cka_tokens: int, rank: int = 0, world: int = 1) -> Work:
    """The work of process `rank` of `world`: every `world`-th shard of rows.

    Args:
        cka_tokens: tokens of the whole pass that run through every expert, in blocks of 256 spread over the rows.
    """
    shards = [range(start, min(start + SHARD_ROWS, len(ids_NS))) for start in range(0, len(ids_NS), SHARD_ROWS)]
    return Work(ids_NS, cka_blocks(len(ids_NS), ids_NS.shape[1], cka_tokens), shards[rank::world])


def cka_blocks(rows: int, row_tokens: int, cka_tokens: int) -> dict[int, list[Span]]:
    """Row -> the CKA blocks: evenly over the rows, walking through the rows' parts.

    Blocks have 256 tokens, or a whole row (or all `cka_tokens`) where that is less; never more than the rows hold.
    """
    size = min(BLOCK_TOKENS, row_tokens, cka_tokens)
    if size == 0:
        return {}
    parts = row_tokens // size
    count = min(cka_tokens // size, rows * parts)
    blocks: dict[int, list[Span]] = {}
    for number in range(count):
        start = number % parts * size
        span = Span(number, group_of(number, count), range(start, start + size))
        blocks.setdefault(number * rows // count, []).append(span)
    return blocks


class ObservedLayer(NamedTuple):
    """A decoder layer as the observers see it."""

    view: MoELayerView | None  # None: dense
    taps: Sequence[Tap]


def layers_of(model: torch.nn.Module) -> list[ObservedLayer]:
    """All decoder layers in order."""
    views = {view.index: view for view in moe_layers(model)}
    taps: dict[int, list[Tap]] = {}
    for tap in dense_taps(model):
        taps.setdefault(tap.layer, []).append(tap)
    return [ObservedLayer(views.get(index), taps.get(index, [])) for index in range(len(decoder_layers(model)))]


def new_sums(model: PreTrainedModel, groups: int, device: torch.device | str) -> PassSums:
    """All sums of a model at zero; only its shapes are read."""
    layers, hidden = layers_of(model), hidden_size(model)
    each = [layer_sums(layer.view, layer.taps, hidden, groups, device) for layer in layers]
    return PassSums(each, model_sums(sum(layer.view is not None for layer in layers), hidden, device))


def hidden_size(model: PreTrainedModel) -> int:
    """D, the width of the residual stream."""
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return embedding.shape[1]


def run_pass(
    model: PreTrainedModel, work: Work, *, partial: Path, identity: dict[str, Any], on_logits: OnLogits | None = None
) -> PassSums:
    """Read every row of `work` once and return the sums.

    Args:
        partial: folder of the saved state; the caller deletes it when it has stored the results.
        identity: what the sums depend on; a state of another identity is not resumed.
        on_logits: sees every row's logits, in the order of the rows.
    """
    partial.mkdir(parents=True, exist_ok=True)
    sums, done = load_state(partial, identity) or (None, 0)
    if sums is None:
        sums = new_sums(model, work.groups, "cpu")
        for layer, layers in zip(layers_of(model), sums.layers, strict=True):
            if layer.view is not None:
                add_weight_sizes(layer.view, layers)
    sums = sums.to(model.device)
    for number in track(range(done, len(work.shards)), "profiling", total=len(work.shards) - done):
        with torch.inference_mode(), observing_all(model, sums) as batch:
            for rows, ids_BS in work.batches(work.shards[number]):
                batch.blocks = work.blocks_of(rows, model.device)
                hidden_BSD = body(model)(input_ids=ids_BS.to(model.device), use_cache=False).last_hidden_state
                for block in batch.blocks:
                    add_block(sums.model, block, block.grams, block.sinks)
                read_out(model, ids_BS, hidden_BSD, sums.model, on_logits)
        save_state(sums, partial, identity, number + 1)
    if not work.shards:
        save_state(sums, partial, identity, 0)  # nothing to read here, and who merges must find that
    return sums


@contextmanager
def observing_all(model: PreTrainedModel, sums: PassSums) -> Iterator[Batch]:
    """Listen to all layers while the context is open; the batch that it gives says where the blocks lie."""
    batch = Batch()
    with ExitStack() as stack:
        for layer, layers in zip(layers_of(model), sums.layers, strict=True):
            stack.enter_context(observing(layer.view, layer.taps, layers, batch))
        yield batch


def add_block(sums: Sums, block: Block, grams: list[Tensor], sinks: list[Tensor]) -> None:
    """Add what a block says about the similarity of layers, when it has passed them all."""
    sums["layer_hsic"] += layers_similarity(grams, sinks).to(sums["layer_hsic"].device)
    sums["cka_tokens"] += len(block.token_N)


def read_out(
    model: PreTrainedModel, ids_BS: Tensor, hidden_BSD: Tensor, sums: Sums, on_logits: OnLogits | None
) -> None:
    """Count the tokens; make the logits row by row, because a batch of them would be the largest tensor of all."""
    sums["tokens"] += ids_BS.numel()
    sums[IMATRIX + "head_in"] += column_squares(hidden_BSD.flatten(0, 1))
    if on_logits is not None:
        for ids_S, hidden_SD in zip(ids_BS.int().numpy(), hidden_BSD, strict=True):
            on_logits(ids_S, head(model)(hidden_SD))


def save_state(sums: PassSums, partial: Path, identity: dict[str, Any], shards: int) -> None:
    """Remember the sums of the first `shards` shards."""
    sums.save(partial / STATE, {"identity": identity, "shards": shards})


def load_state(partial: Path, identity: dict[str, Any]) -> tuple[PassSums, int] | None:
    """The saved sums and how many shards they hold; None where there are none of this identity."""
    path = partial / STATE
    if not path.is_file():
        return None
    try:
        sums, header = PassSums.load(path)
    except InputRejected:
        return None
    if header.get("identity") != identity:
        return None
    log.info("resuming behind %d shards of rows", header["shards"])
    return sums, header["shards"]
