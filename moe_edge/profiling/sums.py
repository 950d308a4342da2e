"""The running sums of a calibration pass: one dictionary of tensors whose size does not depend on the number of tokens.

A flat dictionary, because it is saved after every shard of rows and read back after a kill; `to_statistics` turns
it into the file that later stages read. Sums are float64, counts int64.

Shape suffixes: L layers, E experts, D model width, F expert width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_edge.families.taps import dense_taps
from moe_edge.families.views import moe_layers
from moe_edge.storage.statistics import Statistics

Sums = dict[str, Tensor]
IMATRIX = "imatrix."
EXPERT_SUMS = ("gate_sum", "norm_sum", "norm_sq_sum", "gated_norm_sum", "norm_max")


@dataclass(frozen=True)
class Sizes:
    """Axis lengths of the sums."""

    layers: int
    experts: int
    hidden: int
    width: int
    taps: dict[str, int]  # input columns of each dense matrix product


def sizes_of(model: nn.Module) -> Sizes:
    """Read the sizes from the model's own tensors."""
    views = moe_layers(model)
    columns = {tap.name: tap.module.in_features for tap in dense_taps(model)}
    hidden, width = views[0].experts.down_proj.shape[1:]
    return Sizes(len(views), views[0].count, hidden, width, columns)


def new_sums(sizes: Sizes, device: torch.device | str = "cpu") -> Sums:
    """All sums at zero."""
    layers, experts, hidden, width = sizes.layers, sizes.experts, sizes.hidden, sizes.width
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(EXPERT_SUMS, (layers, experts))
    shapes |= {"out_sum": (layers, experts, hidden), "out_sq_sum": (layers, experts, hidden)}
    shapes |= {
        "hsic": (layers, experts, experts),
        "gated_hsic": (layers, experts, experts),
        "layer_hsic": (layers, layers),
    }
    shapes |= {"entropy": (layers,), "gate_mass": (layers,)}
    shapes |= {IMATRIX + "expert_in": (layers, experts, hidden), IMATRIX + "expert_down": (layers, experts, width)}
    shapes |= {IMATRIX + "ffn_in": (layers, hidden), IMATRIX + "head_in": (hidden,)}
    shapes |= {IMATRIX + name: (layers, columns) for name, columns in sizes.taps.items()}
    sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
    counts: dict[str, tuple[int, ...]] = {"tokens": (), "cka_tokens": (), "sinks": (layers,)}
    counts |= {"counts": (layers, experts), "coroute": (layers, experts, experts)}
    return sums | {name: torch.zeros(shape, dtype=torch.int64, device=device) for name, shape in counts.items()}


def to_statistics(sums: Sums, meta: dict[str, Any]) -> Statistics:
    """The final statistics; means are over the calibration tokens, the sink share over the CKA tokens."""
    tokens, cka_tokens = int(sums["tokens"]), int(sums["cka_tokens"])
    imatrix = {name.removeprefix(IMATRIX): tensor.clone() for name, tensor in sums.items() if name.startswith(IMATRIX)}
    imatrix["expert_count"] = sums["counts"].double()
    imatrix["dense_count"] = sums["tokens"].double()
    return Statistics(
        counts_LE=sums["counts"],
        gate_sum_LE=sums["gate_sum"],
        norm_sum_LE=sums["norm_sum"],
        norm_sq_sum_LE=sums["norm_sq_sum"],
        gated_norm_sum_LE=sums["gated_norm_sum"],
        norm_max_LE=sums["norm_max"],
        out_sum_LED=sums["out_sum"],
        out_sq_sum_LED=sums["out_sq_sum"],
        router_entropy_L=sums["entropy"] / max(tokens, 1),
        coroute_LEE=sums["coroute"],
        gate_mass_L=sums["gate_mass"] / max(tokens, 1),
        hsic_LEE=sums["hsic"],
        gated_hsic_LEE=sums["gated_hsic"],
        layer_hsic_LL=sums["layer_hsic"],
        sink_share_L=sums["sinks"].double() / max(cka_tokens, 1),
        cka_tokens=cka_tokens,
        tokens=tokens,
        imatrix=imatrix,
        meta=meta,
    )
