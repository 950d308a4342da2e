"""The cheapest way to spend bytes: a type for every class and third of the layers under all budgets.

It starts at the fewest bits and again and again buys the upgrade with the largest fall of predicted KL per byte until
nothing fits: the greedy walk along the convex hull of Shoham and Gersho, "Efficient bit allocation for an arbitrary set
of quantizers" (IEEE Trans. ASSP 36, 1988). The walk stops short of the caps wherever the next step is too large; what it
left is spent by exchanges, in which one cell gives bits so that another can have more.

Units: bytes, KL in nats per token. A cell is a (bit class, third of the layers).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from math import inf

from moe_edge.compression.bits import Cell, Sensitivity, cells_of, mix_of
from moe_edge.compression.estimate import (
    GGUF_ALIGNMENT,
    Cache,
    Packing,
    buffer_bytes,
    decode_bytes,
    file_bytes,
    kv_cache_bytes,
    kv_precisions,
    machine_of,
    stored_groups,
)
from moe_edge.compression.options import Option, Space
from moe_edge.contracts.quantization import LEVELS, tensor_bytes, type_for_row
from moe_edge.contracts.spec import EXPERT_OWNED

RECIPE_OF_LEVEL = dict(zip(LEVELS, ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"), strict=True))
KV_Q8_NATS = 0.002  # assumed, what an 8-bit KV cache costs
SMALLEST_GAIN_NATS = 1e-9


@dataclass
class _Costs:
    """Bytes of every cell at every level: in the file, and read per token."""

    file: dict[Cell, dict[str, int]]
    read: dict[Cell, dict[str, float]]  # fractions of bytes: a token reads top-k of the experts


def _costs(space: Space, experts: int) -> _Costs:
    costs = _Costs({}, {})
    groups = list(cells_of(space.model, experts, space.width))
    has_head = any(group.tensor_class == "head" for _, group in groups)
    for cell, group in groups:
        share = space.top_k / experts if group.tensor_class in EXPERT_OWNED else 1.0
        share = 0.0 if group.tensor_class == "embedding" and has_head else share
        file, read = (
            costs.file.setdefault(cell, dict.fromkeys(LEVELS, 0)),
            costs.read.setdefault(cell, dict.fromkeys(LEVELS, 0.0)),
        )
        for kind in LEVELS:
            stored = group.tensors * tensor_bytes(type_for_row(kind, group.shape[-1]), group.shape)
            file[kind] += stored
            read[kind] += stored * share
    return costs


def allocate(space: Space, experts: int, sensitivity: Sensitivity) -> tuple[Option, float] | None:
    """The option with the least predicted quantization KL at this expert count, and that KL; None if nothing fits.

    Both precisions of the KV cache are tried where the target allows them.
    """
    costs = _costs(space, experts)
    found = []
    for precision in kv_precisions(space.model, space.target, "gguf"):
        cache = Cache(space.context_length, precision)
        types = _greedy(costs, sensitivity, *_caps(space, experts, costs, cache))
        if types is None:
            continue
        option = space.judged(experts, _packing(types, space.model.spec.layers), cache)
        nats = sum(sensitivity.of(cell, kind) for cell, kind in types.items())
        if option.fits:
            found.append((option, nats + (KV_Q8_NATS if precision == "q8_0" else 0.0)))
    return min(found, key=lambda pair: pair[1], default=None)


def _packing(types: Mapping[Cell, str], layers: int) -> Packing:
    """Named after the recipe that is nearest to what most experts get."""
    kinds = [types[cell] for cell in types if cell[0] == "expert_gate_up"]
    return Packing("gguf", RECIPE_OF_LEVEL[max(kinds, key=kinds.count)], mix=mix_of(types, layers))


def _caps(space: Space, experts: int, costs: _Costs, cache: Cache) -> tuple[float, float]:
    """What the cells together may take: bytes of the file, and bytes read per token."""
    model, limits, anchor = space.model, space.limits, Packing("gguf", "Q8_0")
    kv = kv_cache_bytes(model, cache)
    other = file_bytes(model, experts, anchor, space.width) - sum(table["Q8_0"] for table in costs.file.values())
    sizes = [] if limits.weights_bytes is None else [limits.weights_bytes]
    if limits.peak_memory_bytes is not None:
        sizes.append(limits.peak_memory_bytes - kv - buffer_bytes(model))
    padding = GGUF_ALIGNMENT * sum(group.tensors for group in stored_groups(model, experts, anchor, space.width))
    file_cap = min(sizes, default=inf) - other - padding
    bandwidth, least = machine_of(space.target).bandwidth_bytes_per_s, limits.decode_tokens_per_s
    if bandwidth is None or least is None:
        return file_cap, inf
    read = decode_bytes(model, experts, space.top_k, anchor, cache, space.width)
    return file_cap, bandwidth / least - (read - sum(table["Q8_0"] for table in costs.read.values()))


def _greedy(costs: _Costs, sensitivity: Sensitivity, file_cap: float, read_cap: float) -> dict[Cell, str] | None:
    """Types per cell; None when even the fewest bits exceed a cap."""
    types = dict.fromkeys(costs.file, LEVELS[0])
    file, read = (sum(table[LEVELS[0]] for table in column.values()) for column in (costs.file, costs.read))
    while file <= file_cap and read <= read_cap:
        best: tuple[float, Cell, str] | None = None
        for cell, now in types.items():
            for kind in LEVELS[LEVELS.index(now) + 1 :]:
                more = costs.file[cell][kind] - costs.file[cell][now]
                gain = sensitivity.of(cell, now) - sensitivity.of(cell, kind)
                fits = file + more <= file_cap and read + costs.read[cell][kind] - costs.read[cell][now] <= read_cap
                if more > 0 and gain > SMALLEST_GAIN_NATS and fits and (best is None or gain / more > best[0]):
                    best = (gain / more, cell, kind)
        if best is None:
            return _exchanged(types, costs, sensitivity, file_cap, read_cap)
        _, cell, kind = best
        file += costs.file[cell][kind] - costs.file[cell][types[cell]]
        read += costs.read[cell][kind] - costs.read[cell][types[cell]]
        types[cell] = kind
    return None


def _exchanged(
    types: dict[Cell, str], costs: _Costs, sensitivity: Sensitivity, file_cap: float, read_cap: float
) -> dict[Cell, str]:
    """The best change of two cells at a time that lowers the predicted KL under both caps, until there is none."""
    types = dict(types)
    while True:
        spare_file = file_cap - sum(costs.file[cell][kind] for cell, kind in types.items())
        spare_read = read_cap - sum(costs.read[cell][kind] for cell, kind in types.items())
        moves = [
            (
                sensitivity.of(cell, kind) - sensitivity.of(cell, now),
                costs.file[cell][kind] - costs.file[cell][now],
                costs.read[cell][kind] - costs.read[cell][now],
                cell,
                kind,
            )
            for cell, now in types.items()
            for kind in LEVELS
        ]  # a cell's move to where it is changes nothing, so that pairs hold single moves, too
        fitting = (
            (first[0] + second[0], first, second)
            for first, second in combinations(moves, 2)
            if first[3] != second[3] and first[1] + second[1] <= spare_file and first[2] + second[2] <= spare_read
        )
        nats, *pair = min(fitting, key=lambda row: row[0], default=(0.0,))
        if nats >= -SMALLEST_GAIN_NATS:
            return types
        types |= {cell: kind for *_, cell, kind in pair}
