"""The pass for a teacher larger than memory: all rows through one layer, then the next layer is read.

The residual stream of all rows waits on disk between layers, in float32, so that the sums are those of the pass with
the whole model. Memory holds one layer, or the embedding, or the head, and one batch of rows. A layer is finished when
its sums are saved; a killed run begins again with the layer that was running, and ends with bit-identical statistics.

Files in the folder of the unfinished pass: hidden-L.f32, what layer L reads; layer-L.safetensors, its sums;
blocks-L.f32, of every CKA block the Gram matrix of the residual stream behind layer L, and its sinks as one more row;
sums.safetensors, first the model's own sums while the logits are made, at the end all.

Shape suffixes: B rows of a batch, S tokens of a row, D model width, N tokens of a block, L MoE layers.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_edge.contracts.errors import InputRejected
from moe_edge.models.streaming import StreamedModel
from moe_edge.process.progress import track
from moe_edge.profiling.observers import Batch, add_weight_sizes, observing
from moe_edge.profiling.passes import (
    OnLogits,
    Work,
    add_block,
    layers_of,
    load_state,
    new_sums,
    read_out,
    save_state,
)
from moe_edge.profiling.sums import PassSums, layer_sums, model_sums
from moe_edge.storage.rows import Spill, is_complete
from moe_edge.storage.tensor_files import load_tensors, save_tensors

log = logging.getLogger(__name__)


def run_layerwise(
    teacher: StreamedModel, work: Work, *, partial: Path, identity: dict[str, Any], on_logits: OnLogits | None = None
) -> PassSums:
    """Read every row of `work` once and return the sums, on the CPU; arguments as of `passes.run_pass`."""
    partial.mkdir(parents=True, exist_ok=True)
    sums, shards = load_state(partial, identity) or (None, 0)
    if sums is not None and sums.layers:
        return sums
    if work.shards:
        layerwise = _Pass(teacher, work, partial, identity)
        layerwise.embed()
        layerwise.pass_layers()
        model = layerwise.read_out(sums, shards, on_logits)
        sums = PassSums([load_tensors(layerwise.sums_file(index))[0] for index in range(len(layerwise.layers))], model)
    else:
        sums = new_sums(teacher.model, work.groups, "cpu")
    save_state(sums, partial, identity, len(work.shards))
    return sums


class _Pass:
    """One pass and its folder."""

    def __init__(self, teacher: StreamedModel, work: Work, partial: Path, identity: dict[str, Any]) -> None:
        self.teacher, self.work, self.partial, self.identity = teacher, work, partial, identity
        self.layers = layers_of(teacher.model)
        self.hidden = (work.ids_NS.shape[1], teacher.width)
        self.done = self._finished_layers()

    def embed(self) -> None:
        """Write what the first layer reads, unless a layer has read it already."""
        if self.done:
            return
        with self.teacher.loaded("embedding"), Spill(self._hidden_file(0), self.hidden, write=True) as spill:
            for _, _, ids_BS in self._batches():
                with torch.inference_mode():
                    spill.append(self.teacher.embed(ids_BS))

    def pass_layers(self) -> None:
        """Read one layer's weights after the other and let all rows through."""
        for index in track(range(self.done, len(self.layers)), "profiling, layer by layer"):
            with self.teacher.loaded(index):
                self._pass_layer(index)
            self._hidden_file(index).unlink()

    def _pass_layer(self, index: int) -> None:
        layer, batch = self.layers[index], Batch()
        sums = layer_sums(layer.view, layer.taps, self.hidden[1], self.work.groups, self.teacher.device)
        if layer.view is not None:
            add_weight_sizes(layer.view, sums)
        with ExitStack() as files, torch.inference_mode(), observing(layer.view, layer.taps, sums, batch):
            given = files.enter_context(Spill(self._hidden_file(index), self.hidden))
            taken = files.enter_context(Spill(self._hidden_file(index + 1), self.hidden, write=True))
            blocks = files.enter_context(self._blocks(index, write=True))
            for place, rows, ids_BS in self._batches():
                batch.blocks = self.work.blocks_of(rows, self.teacher.device)
                taken.append(self.teacher.step(index, ids_BS, given.rows(place, place + len(rows))))
                for block in batch.blocks if layer.view is not None else ():
                    blocks.append(torch.cat([block.grams[0], block.sinks[0][None].float()])[None])
        save_tensors(self.sums_file(index), sums, {"identity": self.identity})

    def read_out(self, sums: PassSums | None, shards: int, on_logits: OnLogits | None) -> dict[str, Tensor]:
        """The similarity of layers, the head's input, and the logits; saved after every shard.

        Args:
            sums, shards: the saved state, if a run was killed here.
        """
        moe = [index for index, layer in enumerate(self.layers) if layer.view is not None]
        model = sums.model if sums is not None else model_sums(len(moe), self.hidden[1])
        model = {name: tensor.to(self.teacher.device) for name, tensor in model.items()}
        seen = sum(len(self.work.blocks.get(row, [])) for shard in self.work.shards[:shards] for row in shard)
        with ExitStack() as files, self.teacher.loaded("head"):
            given = files.enter_context(Spill(self._hidden_file(len(self.layers)), self.hidden))
            spilled = [files.enter_context(self._blocks(index)) for index in moe]
            for number in track(range(shards, len(self.work.shards)), "logits"):
                for place, rows, ids_BS in self._batches(number, number + 1):
                    for block in self.work.blocks_of(rows, "cpu"):
                        add_block(model, block, *_read_block(spilled, seen))
                        seen += 1
                    with torch.inference_mode():
                        hidden_BSD = self.teacher.finish(ids_BS, given.rows(place, place + len(rows)))
                        read_out(self.teacher.model, ids_BS, hidden_BSD, model, on_logits)
                save_state(PassSums([], model), self.partial, self.identity, number + 1)
        return {name: tensor.cpu() for name, tensor in model.items()}

    def _batches(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, range, Tensor]]:
        """(place among the spilled rows, rows, ids [B, S]) of the shards first..last."""
        place = sum(len(shard) for shard in self.work.shards[:first])
        for shard in self.work.shards[first:last]:
            for rows, ids_BS in self.work.batches(shard):
                yield place, rows, ids_BS
                place += len(rows)

    def sums_file(self, layer: int) -> Path:
        return self.partial / f"layer-{layer:03d}.safetensors"

    def _hidden_file(self, layer: int) -> Path:
        return self.partial / f"hidden-{layer:03d}.f32"

    def _blocks(self, layer: int, *, write: bool = False) -> Spill:
        tokens = next((len(span.tokens) for spans in self.work.blocks.values() for span in spans), 0)
        return Spill(self.partial / f"blocks-{layer:03d}.f32", (tokens + 1, tokens), write=write)

    def _finished_layers(self) -> int:
        """How many layers need not run again: their sums are there, and so is what the next layer reads."""
        done = 0
        while done < len(self.layers) and self._is_finished(done):
            done += 1
        if done and not is_complete(self._hidden_file(done), self.work.rows, self.hidden):
            return 0
        if done:
            log.info("resuming behind %d layers", done)
        return done

    def _is_finished(self, layer: int) -> bool:
        try:
            return bool(load_tensors(self.sums_file(layer))[1].get("identity") == self.identity)
        except InputRejected:
            return False


def _read_block(spilled: Sequence[Spill], number: int) -> tuple[list[Tensor], list[Tensor]]:
    """(Gram matrices [N, N], sinks [N]) of a block behind every MoE layer."""
    rows = [spill.rows(number, number + 1)[0] for spill in spilled]
    return [row[:-1] for row in rows], [row[-1] > 0 for row in rows]
