"""What each storage type costs in KL, per class of tensors and third of the layers: measured values, or a prior.

The KLs of the classes are added up. Between two measured types the KL is a power of the quantization noise; beyond them
it grows with the square root of the noise power, because in a MoE most of it comes from tokens that are routed to
other experts, and their number grows with the amplitude of the noise (on a 135 M parameter Qwen2-MoE the exponent of
whole classes between Q8_0 and Q4_K was .3 to .5).

Units: KL in nats per token. A cell is a (bit class, third of the layers).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import exp, log, prod
from typing import Literal

from moe_edge.contracts.quantization import (
    ALWAYS_F32,
    BIT_CLASS_OF,
    BIT_CLASSES,
    LEVELS,
    RECIPES,
    layer_thirds,
    mix_key,
    type_for_row,
)
from moe_edge.planning.estimate import Packing, stored_groups
from moe_edge.planning.headers import Group, ModelHeaders

TINY_NATS = 1e-12
Cell = tuple[str, int]  # bit class, third of the layers (0 for what lies outside the layers)
# Mean squared error of ggml's quantizers on normal rows of variance 1, with an imatrix where the type uses one (measured).
NOISE = {
    "F32": 0.0, "F16": 0.0, "BF16": 2.8e-6, "Q8_0": 2.9e-5, "Q6_K": 3.1e-4, "Q5_K": 1.28e-3, "Q5_1": 1.18e-3,
    "Q5_0": 1.67e-3, "Q4_K": 5.2e-3, "Q4_1": 5.6e-3, "IQ4_NL": 5.7e-3, "Q4_0": 6.8e-3, "Q3_K": 2.15e-2, "Q2_K": 7.5e-2,
    "IQ4_XS": 5.8e-3, "MXFP4": 1.33e-2, "IQ3_S": 1.9e-2, "IQ3_XXS": 3.3e-2, "IQ2_S": 6.2e-2, "IQ2_XS": 9.0e-2,
    "IQ2_XXS": 0.119,
}  # fmt: skip
ROUTING_EXPONENT = 0.5  # of the noise power
# KL of a whole class per square root of noise power, nats: a prior, measured on a 135 M parameter Qwen2-MoE (1024 tokens)
PRIOR_NATS = {"attention": 0.8, "expert_gate_up": 0.35, "expert_down": 0.25, "shared": 1.0, "embedding_head": 0.5}


@dataclass(frozen=True)
class Sensitivity:
    """What storing a cell as a type costs, all else in full precision."""

    nats: Mapping[Cell, Mapping[str, float]]  # cell -> every level that may be chosen (before fallbacks) -> KL
    source: Literal["measured", "prior"]
    tokens: int = 0  # on which it was measured

    def levels(self, cell: Cell) -> tuple[str, ...]:
        """What may be chosen for a cell; the levels that every model can have where nothing is known of it."""
        return tuple(self.nats.get(cell, LEVELS))

    def of(self, cell: Cell, kind: str) -> float:
        """KL of one cell as `kind`, any ggml type; 0 for absent cells."""
        known = self.nats.get(cell, {})
        if kind in known or not known:
            return known.get(kind, 0.0)
        return along_noise({NOISE[level]: nats for level, nats in known.items()}, NOISE[kind])

    def of_packing(self, packing: Packing, layers: int) -> float:
        """KL of a whole model stored as a GGUF recipe, with the mix's types where it names any."""
        types = recipe_types(packing.name, layers) | mix_types(packing.mix, layers)
        return sum(self.of(cell, kind) for cell, kind in types.items())


def along_noise(known: Mapping[float, float], noise: float) -> float:
    """KL at a noise power from a few known points: a power law between neighbours, the square root beyond the ends.

    Args:
        known: noise power -> nats, not empty.
    """
    if noise == 0:
        return 0.0
    below = max((point for point in known if 0 < point <= noise), default=None)
    above = min((point for point in known if point >= noise), default=None)
    if below is None or above is None or below == above:
        nearest = above if below is None else below
        return 0.0 if nearest is None else known[nearest] * (noise / nearest) ** ROUTING_EXPONENT
    low, high = (log(max(known[point], TINY_NATS)) for point in (below, above))
    return exp(low + (high - low) * log(noise / below) / log(above / below))


def prior_sensitivity(model: ModelHeaders) -> Sensitivity:
    """Without a measurement: a constant per class times the noise of the types that the rows really get."""
    weights: dict[Cell, int] = {}
    power: dict[Cell, dict[str, float]] = {}
    for cell, group in cells_of(model, model.spec.moe.experts):
        size = group.tensors * prod(group.shape)
        weights[cell] = weights.get(cell, 0) + size
        table = power.setdefault(cell, dict.fromkeys(LEVELS, 0.0))
        for kind in LEVELS:
            table[kind] += size * NOISE[type_for_row(kind, group.shape[-1])]
    nats: dict[Cell, dict[str, float]] = {}
    for cell, table in power.items():
        share = weights[cell] / sum(size for other, size in weights.items() if other[0] == cell[0])
        nats[cell] = {
            kind: share * along_noise({1.0: PRIOR_NATS[cell[0]]}, value / weights[cell])
            for kind, value in table.items()
        }
    return Sensitivity(nats, "prior")


def recipe_types(recipe: str, layers: int) -> dict[Cell, str]:
    """The type of every cell under a recipe."""
    table = RECIPES[recipe]
    return {cell: table[BIT_CLASSES[cell[0]][0]] for cell in _cells(layers)}


def mix_types(mix: tuple[tuple[str, str], ...], layers: int) -> dict[Cell, str]:
    """The cells that a mix names (as `mix_of` writes it)."""
    found: dict[Cell, str] = {}
    thirds = layer_thirds(layers)
    for text, kind in reversed(mix):  # the first match wins
        key = mix_key(text)
        for cell in _cells(layers):
            if cell[0] == key.bit_class and (key.layers is None or thirds[cell[1]][0] in key.layers):
                found[cell] = kind
    return found


def mix_of(types: Mapping[Cell, str], layers: int) -> tuple[tuple[str, str], ...]:
    """Types per cell as the rows of a plan: one per class, or one per run of equal thirds."""
    thirds, rows = layer_thirds(layers), []
    for name in BIT_CLASSES:
        kinds = [types[name, third] for third in range(len(thirds)) if (name, third) in types]
        if len(set(kinds)) == 1:
            rows.append((name, kinds[0]))
            continue
        first = 0
        for third, kind in enumerate(kinds):
            if third + 1 == len(kinds) or kinds[third + 1] != kind:
                rows.append((f"{name}@{thirds[first][0]}-{thirds[third][-1]}", kind))
                first = third + 1
    return tuple(rows)


def _cells(layers: int) -> list[Cell]:
    thirds = range(len(layer_thirds(layers)))
    return [(name, third) for name in BIT_CLASSES for third in (thirds if name != "embedding_head" else (0,))]


def cells_of(model: ModelHeaders, experts: int, width: int | None = None) -> Iterator[tuple[Cell, Group]]:
    """Every group of tensors whose bits can be chosen, with its cell."""
    first_layers = [third[0] for third in layer_thirds(model.spec.layers)]
    for group in stored_groups(model, experts, Packing("gguf", "F16"), width):
        if group.tensor_class not in ALWAYS_F32 and group.tensor_class in BIT_CLASS_OF:
            third = 0 if group.layer is None else first_layers.index(group.layer)
            yield (BIT_CLASS_OF[group.tensor_class], third), group
