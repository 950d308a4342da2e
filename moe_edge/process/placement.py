"""The one memory policy: which device a stage computes on, in which dtype, and whether it holds the teacher or streams it.

Everything that asks for free memory asks `free_bytes`. A decision is made once per stage and kept in the stage's folder, so that
a resumed stage goes on as it began, whatever memory is free by then (`settled`). The file's name begins with a dot: where a stage
computed is no part of what it computed, and not of its digest.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from moe_edge.contracts.artifacts import Placement
from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.process.limits import free_memory_bytes
from moe_edge.process.ranks import Ranks, current_ranks
from moe_edge.storage.files import write_text_atomic

log = logging.getLogger(__name__)
DECIDED = ".placement.json"
# Of the free memory that the weights may take where a model runs: activations, sums and logits need the rest.
RUN_SHARE = 0.6
EDIT_FACTOR = 1.3  # x the weights: to hold a model that is changed, with the student beside it and activations
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALONE = Ranks()  # a stage that one process runs, whatever else the launch has
Mode = Literal["auto", "whole", "layerwise"]


def free_bytes(device: torch.device | str = "cpu", sharers: int = 1) -> int:
    """Memory that is free on a device now, or one process's share of this machine's, under the limits of its container."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory_bytes() // sharers


def held_bytes(headers: CheckpointHeaders, dtype: torch.dtype) -> int:
    """What the whole model's weights take in memory in `dtype`."""
    return dtype.itemsize * headers.weights


def fits_in_memory(
    headers: CheckpointHeaders,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    sharers: int = 1,
    *,
    share: float = RUN_SHARE,
) -> bool:
    """May the whole model be loaded in `dtype` and run now, or is it better streamed?

    Args:
        sharers: processes on this machine that load the model at once; each accelerator has memory of its own.
        share: of what is free that the weights may take.
    """
    needed, free = held_bytes(headers, dtype), free_bytes(device, sharers)
    fits = needed <= share * free
    log.log(
        logging.DEBUG if fits else logging.INFO,
        "the model takes %.1f GiB of %.1f: %s",
        needed / 2**30,
        free / 2**30,
        "fits" if fits else "too large",
    )
    return fits


def can_be_edited(headers: CheckpointHeaders, device: torch.device | str = "cpu") -> bool:
    """Is there room on a device to hold the whole model as it is stored, and to change it?"""
    return free_bytes(device) >= EDIT_FACTOR * headers.total_bytes


def compute_device(ranks: Ranks | None = None) -> torch.device:
    """This process's own accelerator, where there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", (ranks or current_ranks()).local_rank % torch.cuda.device_count())


def to_run(headers: CheckpointHeaders, dtype: str, mode: Mode, ranks: Ranks = ALONE) -> Placement:
    """Where a teacher runs over text.

    Args:
        dtype: teacher.dtype; auto is float32 on a CPU and bfloat16 on an accelerator.
        mode: profile.mode; auto streams what does not fit.
    """
    device = compute_device(ranks)
    name = dtype if dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    whole = mode == "whole" or (mode == "auto" and fits_in_memory(headers, DTYPES[name], device, ranks.local_world))
    return Placement(device=str(device), dtype=name, mode="whole" if whole else "streamed", processes=ranks.world)


def to_edit(headers: CheckpointHeaders, *, streamed: bool, accelerate: bool) -> Placement:
    """Where a teacher is turned into a student: in memory, or tensor by tensor on disk.

    Args:
        streamed: it was asked to be streamed, and can be.
        accelerate: is there something to compute, which an accelerator with room for the model does faster?
    """
    cuda = accelerate and torch.cuda.is_available() and can_be_edited(headers, "cuda")
    return Placement(
        device=str(compute_device()) if cuda else "cpu",
        mode="whole" if can_be_edited(headers) and not streamed else "streamed",
    )


def settled(out: Path, decide: Callable[[], Placement], ranks: Ranks = ALONE) -> Placement:
    """The stage's placement: what an interrupted run of it decided, or what `decide` says now.

    Args:
        ranks: the processes that share the stage, which all call this: the leader's word holds for all of them.
    """
    path = out / DECIDED

    def leader() -> Placement:
        if path.is_file():
            kept = Placement.model_validate_json(path.read_text())
            if kept.processes == ranks.world:
                return kept
        placement = decide()
        write_text_atomic(path, placement.model_dump_json(indent=1) + "\n")
        return placement

    placement = ranks.lead(leader)
    if placement.device.startswith("cuda"):  # each process has an accelerator of its own
        placement = placement.model_copy(update={"device": str(compute_device(ranks))})
    return placement
