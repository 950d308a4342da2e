"""The cheapest way to spend bytes: a type for every class and third of the layers under all budgets.

The least predicted KL under caps on the file's bytes and on the bytes that a token reads is a multiple-choice knapsack of
at most 13 cells, which an integer program solves exactly: more bytes never cost predicted KL. The recipes that fit are
candidates, too: the prediction rests on a few measured tokens, so a mix has to be better by a margin to replace one.

Units: bytes, KL in nats per token. A cell is a (bit class, third of the layers).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf, isfinite

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from moe_edge.contracts.quantization import CODEBOOK_LEVELS, LEVELS, RECIPES, tensor_bytes, type_for_row
from moe_edge.contracts.spec import EXPERT_OWNED
from moe_edge.planning.bits import Cell, Sensitivity, cells_of, mix_of, recipe_types
from moe_edge.planning.estimate import (
    GGUF_ALIGNMENT,
    Cache,
    Packing,
    buffer_bytes,
    decode_bytes,
    file_bytes,
    kv_cache_bytes,
    kv_precisions,
    machine_of,
)
from moe_edge.planning.options import Option, Space

RECIPE_OF_LEVEL = dict(zip(LEVELS, ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"), strict=True))
RECIPE_OF_LEVEL |= {level: level for level in CODEBOOK_LEVELS}
KV_Q8_NATS = 0.002  # assumed, what an 8-bit KV cache costs
CLEAR_MARGIN = 0.02  # of the predicted KL: by less than this a mix is not better than a recipe
SOLVER_SLACK = 1e-5  # of a cap, which the solver may exceed by less
SMALLEST_GAIN_NATS = 1e-9
SOLVER_NATS = 1e3  # what the largest KL is scaled to, because the solver stops at an absolute gap of 1e-6


@dataclass
class CellBytes:
    """Bytes of every cell at every level: in the file with the padding behind each tensor, and read per token."""

    file: dict[Cell, dict[str, int]]
    read: dict[Cell, dict[str, float]]  # fractions of bytes: a token reads top-k of the experts


def cell_bytes(space: Space, experts: int) -> CellBytes:
    costs, kinds = CellBytes({}, {}), (*LEVELS, *CODEBOOK_LEVELS)
    groups = list(cells_of(space.model, experts, space.width))
    has_head = any(group.tensor_class == "head" for _, group in groups)
    for cell, group in groups:
        share = space.top_k / experts if group.tensor_class in EXPERT_OWNED else 1.0
        share = 0.0 if group.tensor_class == "embedding" and has_head else share
        file = costs.file.setdefault(cell, dict.fromkeys(kinds, 0))
        read = costs.read.setdefault(cell, dict.fromkeys(kinds, 0.0))
        for kind in kinds:
            stored = tensor_bytes(type_for_row(kind, group.shape[-1]), group.shape)
            file[kind] += group.tensors * _padded(stored)
            read[kind] += group.tensors * stored * share
    return costs


def _padded(size: int) -> int:
    return -(-size // GGUF_ALIGNMENT) * GGUF_ALIGNMENT


def allocate(space: Space, experts: int, sensitivity: Sensitivity) -> tuple[Option, float] | None:
    """The option with the least predicted quantization KL at this expert count, and that KL; None if nothing fits.

    A recipe wins over a mix that is not better by a clear margin. Both precisions of the KV cache are tried where the
    target allows them.
    """
    costs, solved = cell_bytes(space, experts), set()
    found = []
    for precision in kv_precisions(space.model, space.target, "gguf"):
        cache = Cache(space.context_length, precision)
        caps = _caps(space, experts, costs, cache)
        if caps in solved:  # a smaller cache leaves no more to the weights
            continue
        solved.add(caps)
        best = _best(space, experts, costs, sensitivity, cache, *caps)
        if best is not None:
            found.append((best[0], best[1] + (KV_Q8_NATS if precision == "q8_0" else 0.0)))
    return min(found, key=lambda pair: pair[1], default=None)


def _best(
    space: Space,
    experts: int,
    costs: CellBytes,
    sensitivity: Sensitivity,
    cache: Cache,
    file_cap: float,
    read_cap: float,
) -> tuple[Option, float] | None:
    """The best recipe that fits, where the best mix is not clearly better, or the mix."""
    layers = space.model.spec.layers
    mix = cheapest(costs.file, costs.read, sensitivity, file_cap, read_cap)
    least = inf if mix is None else sum(sensitivity.of(cell, kind) for cell, kind in mix.items())
    near = [
        (nats, Packing("gguf", name))
        for name, types in _recipes(costs.file, sensitivity, layers)
        if (nats := sum(sensitivity.of(cell, kind) for cell, kind in types.items())) <= least * (1 + CLEAR_MARGIN)
        and sum(costs.file[cell][kind] for cell, kind in types.items()) <= file_cap
    ]
    near.sort(key=lambda pair: pair[0])
    for nats, packing in [*near, *([] if mix is None else [(least, _packing(mix, layers))])]:
        option = space.judged(experts, packing, cache)
        if option.fits:
            return option, nats
    return None


def _recipes(cells: Iterable[Cell], sensitivity: Sensitivity, layers: int) -> Iterator[tuple[str, dict[Cell, str]]]:
    """The recipes that name nothing but what may be chosen, with their types."""
    cells = list(cells)
    for name in RECIPES:
        everywhere = recipe_types(name, layers)
        types = {cell: everywhere[cell] for cell in cells}
        if all(kind in sensitivity.levels(cell) for cell, kind in types.items()):
            yield name, types


def _packing(types: Mapping[Cell, str], layers: int) -> Packing:
    """Named after the recipe that is nearest to what most experts get."""
    kinds = [types[cell] for cell in types if cell[0] == "expert_gate_up"]
    return Packing("gguf", RECIPE_OF_LEVEL[max(kinds, key=kinds.count)], mix=mix_of(types, layers))


def _caps(space: Space, experts: int, costs: CellBytes, cache: Cache) -> tuple[float, float]:
    """What the cells together may take: bytes of the file, and bytes read per token."""
    model, limits, anchor = space.model, space.limits, Packing("gguf", "Q8_0")
    kv = kv_cache_bytes(model, cache)
    other = file_bytes(model, experts, anchor, space.width) - sum(table["Q8_0"] for table in costs.file.values())
    sizes = [] if limits.weights_bytes is None else [limits.weights_bytes]
    if limits.peak_memory_bytes is not None:
        sizes.append(limits.peak_memory_bytes - kv - buffer_bytes(model))
    file_cap = min(sizes, default=inf) - other
    bandwidth, least = machine_of(space.target).bandwidth_bytes_per_s, limits.decode_tokens_per_s
    if bandwidth is None or least is None:
        return file_cap, inf
    read = decode_bytes(model, experts, space.top_k, anchor, cache, space.width)
    return file_cap, bandwidth / least - (read - sum(table["Q8_0"] for table in costs.read.values()))


def cheapest(
    file: Mapping[Cell, Mapping[str, int]],
    read: Mapping[Cell, Mapping[str, float]],
    sensitivity: Sensitivity,
    file_cap: float,
    read_cap: float,
) -> dict[Cell, str] | None:
    """Types per cell with the least predicted KL under both caps; None when even the fewest bits exceed one.

    Args:
        file: cell -> level -> bytes in the file.
        read: cell -> level -> bytes read per token.
    """
    choices = [(cell, kind) for cell in file for kind in _worthwhile(cell, file[cell], read[cell], sensitivity)]
    nats = np.array([sensitivity.of(cell, kind) for cell, kind in choices])
    bytes_RC = np.array([[table[cell][kind] for cell, kind in choices] for table in (file, read)], dtype=float)
    of_cell_NC = np.array([[float(cell == other) for cell, _ in choices] for other in file])
    caps = [(row_C, cap) for row_C, cap in zip(bytes_RC, (file_cap, read_cap), strict=True) if isfinite(cap)]
    fewest = [np.where(of_cell_NC > 0, row_C, inf).min(axis=1).sum() for row_C, _ in caps]
    if any(cap <= 0 or least > cap for least, (_, cap) in zip(fewest, caps, strict=True)):
        return None
    solved = milp(
        SOLVER_NATS * nats / (nats.max() or 1.0),
        constraints=[
            LinearConstraint(of_cell_NC, 1, 1),
            *(LinearConstraint(row_C[None] / cap, ub=1 - SOLVER_SLACK) for row_C, cap in caps),
        ],
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        return None
    return {cell: kind for (cell, kind), taken in zip(choices, solved.x, strict=True) if taken > 0.5}


def _worthwhile(cell: Cell, file: Mapping[str, int], read: Mapping[str, float], sensitivity: Sensitivity) -> list[str]:
    """The levels of a cell to which no other is preferable: less KL for no more bytes, or as little for fewer."""
    found: list[str] = []
    for kind in sorted(sensitivity.levels(cell), key=lambda kind: (file[kind], read[kind], sensitivity.of(cell, kind))):
        gains = [sensitivity.of(cell, other) - sensitivity.of(cell, kind) for other in found]
        if all(gain > SMALLEST_GAIN_NATS for gain in gains):
            found.append(kind)
    return found
