"""The running sums of a calibration pass: a dictionary of tensors per decoder layer and one for the model.

Their size does not depend on the number of tokens. A layer's sums stand alone, because a teacher larger than memory is
read layer by layer; sums of different rows add up to the sums of all rows, because several processes may share the
work. `to_statistics` turns them into the file that later stages read. Sums are float64, counts int64.

Shape suffixes: L MoE layers, A all decoder layers, E experts, D model width, F expert width, G groups of blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_edge.models.taps import Tap
from moe_edge.models.views import MoELayerView
from moe_edge.models.weights import expert_width
from moe_edge.storage.statistics import Statistics
from moe_edge.storage.tensor_files import load_tensors, save_tensors

Sums = dict[str, Tensor]
IMATRIX = "imatrix."
PER_EXPERT = (
    "gate_sum", "norm_sum", "norm_sq_sum", "gated_norm_sum", "norm_max", "loo_sq_sum", "weight_mean_abs", "weight_rms",
)  # fmt: skip
MAXIMA = ("norm_max", "weight_mean_abs", "weight_rms")  # of several processes the largest; weights are the same in all


@dataclass(frozen=True)
class PassSums:
    """What a pass has added up so far."""

    layers: list[Sums]  # one per decoder layer
    model: Sums

    def save(self, path: Path, header: dict[str, Any]) -> None:
        """One safetensors file, atomically."""
        tensors = {f"{index}.{name}": tensor for index, sums in enumerate(self.layers) for name, tensor in sums.items()}
        save_tensors(path, tensors | {f"model.{name}": tensor for name, tensor in self.model.items()}, header)

    def to(self, device: torch.device | str) -> "PassSums":
        """The same sums on a device."""
        layers = [{name: tensor.to(device) for name, tensor in sums.items()} for sums in self.layers]
        return PassSums(layers, {name: tensor.to(device) for name, tensor in self.model.items()})

    @classmethod
    def load(cls, path: Path) -> tuple["PassSums", dict[str, Any]]:
        """What `save` wrote, on the CPU, and its header. Raises InputRejected when the file cannot be read."""
        tensors, header = load_tensors(path)
        owners: dict[str, Sums] = {}
        for key, tensor in tensors.items():
            owner, _, name = key.partition(".")
            owners.setdefault(owner, {})[name] = tensor
        model = owners.pop("model", {})
        return cls(
            [owners.get(str(index), {}) for index in range(max(map(int, owners), default=-1) + 1)], model
        ), header


def layer_sums(
    view: MoELayerView | None, taps: Sequence[Tap], hidden: int, groups: int, device: torch.device | str = "cpu"
) -> Sums:
    """The sums of one decoder layer at zero.

    Args:
        view: its experts; None for a dense layer.
        taps: the inputs of its dense matrix products.
        groups: G.
    """
    shapes: dict[str, tuple[int, ...]] = {IMATRIX + tap.name: (columns_of(tap),) for tap in taps}
    counts: dict[str, tuple[int, ...]] = {}
    if view is not None:
        experts, width = view.count, expert_width(view)
        shapes |= dict.fromkeys(PER_EXPERT, (experts,)) | dict.fromkeys(("out_sum", "out_sq_sum"), (experts, hidden))
        shapes |= dict.fromkeys(("hsic", "gated_hsic", "null_hsic"), (experts, experts))
        shapes |= {"hsic_groups": (groups, experts, experts), "entropy": (), "gate_mass": (), "out_energy": ()}
        shapes |= {IMATRIX + "ffn_in": (hidden,), IMATRIX + "expert_in": (experts, hidden)}
        shapes |= {IMATRIX + "expert_down": (experts, width)}
        counts = {"counts": (experts,), "loo_counts": (experts,), "coroute": (experts, experts), "sinks": ()}
    return _zeros(shapes, counts, device)


def columns_of(tap: Tap) -> int:
    """Input columns of a tap's matrix."""
    columns: int = tap.module.in_features  # type: ignore[assignment]
    return columns


def model_sums(moe_layers: int, hidden: int, device: torch.device | str = "cpu") -> Sums:
    """The sums that belong to no single layer at zero."""
    shapes = {"layer_hsic": (moe_layers, moe_layers), IMATRIX + "head_in": (hidden,)}
    return _zeros(shapes, {"tokens": (), "cka_tokens": ()}, device)


def _zeros(shapes: dict[str, tuple[int, ...]], counts: dict[str, tuple[int, ...]], device: torch.device | str) -> Sums:
    sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
    return sums | {name: torch.zeros(shape, dtype=torch.int64, device=device) for name, shape in counts.items()}


def merged(parts: Sequence[PassSums]) -> PassSums:
    """The sums of all rows from those of disjoint sets of rows."""
    layers = [_merged(sums) for sums in zip(*(part.layers for part in parts), strict=True)]
    return PassSums(layers, _merged([part.model for part in parts]))


def _merged(parts: Sequence[Sums]) -> Sums:
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return {name: tensor.amax(dim=0) if name in MAXIMA else tensor.sum(dim=0) for name, tensor in stacked.items()}


def to_statistics(sums: PassSums, meta: dict[str, Any]) -> Statistics:
    """The final statistics; means are over the calibration tokens, the sink share over the CKA tokens."""
    moe = [index for index, layer in enumerate(sums.layers) if "counts" in layer]
    tokens, cka_tokens = int(sums.model["tokens"]), int(sums.model["cka_tokens"])

    def stacked(name: str) -> Tensor:
        return torch.stack([sums.layers[index][name].cpu() for index in moe])

    return Statistics(
        counts_LE=stacked("counts"),
        gate_sum_LE=stacked("gate_sum"),
        norm_sum_LE=stacked("norm_sum"),
        norm_sq_sum_LE=stacked("norm_sq_sum"),
        gated_norm_sum_LE=stacked("gated_norm_sum"),
        norm_max_LE=stacked("norm_max"),
        out_sum_LED=stacked("out_sum"),
        out_sq_sum_LED=stacked("out_sq_sum"),
        router_entropy_L=stacked("entropy") / max(tokens, 1),
        coroute_LEE=stacked("coroute"),
        gate_mass_L=stacked("gate_mass") / max(tokens, 1),
        hsic_LEE=stacked("hsic"),
        gated_hsic_LEE=stacked("gated_hsic"),
        hsic_groups_GLEE=stacked("hsic_groups").float().transpose(0, 1),
        null_hsic_LEE=stacked("null_hsic"),
        layer_hsic_LL=sums.model["layer_hsic"].cpu(),
        sink_share_L=stacked("sinks").double() / max(cka_tokens, 1),
        loo_sq_sum_LE=stacked("loo_sq_sum"),
        loo_counts_LE=stacked("loo_counts"),
        out_energy_L=stacked("out_energy"),
        weight_mean_abs_LE=stacked("weight_mean_abs"),
        weight_rms_LE=stacked("weight_rms"),
        cka_tokens=cka_tokens,
        tokens=tokens,
        imatrix=_imatrix(sums),
        meta={"moe_layers": moe} | meta,
    )


def _imatrix(sums: PassSums) -> dict[str, Tensor]:
    """Expert rows are of the MoE layers [L, ...], all others of all decoder layers [A, ...]; zero where there is none."""
    moe = [layer for layer in sums.layers if "counts" in layer]
    names = {name for layer in sums.layers for name in layer if name.startswith(IMATRIX)}
    imatrix = {}
    for name in sorted(names):
        layers = moe if name.startswith(IMATRIX + "expert_") else sums.layers
        shape = next(layer[name].shape for layer in layers if name in layer)
        rows = [layer[name] if name in layer else torch.zeros(shape, dtype=torch.float64) for layer in layers]
        imatrix[name.removeprefix(IMATRIX)] = torch.stack([row.cpu() for row in rows])
    imatrix["head_in"] = sums.model[IMATRIX + "head_in"].cpu()
    imatrix["expert_count"] = torch.stack([layer["counts"].cpu() for layer in moe]).double()
    imatrix["dense_count"] = sums.model["tokens"].cpu().double()
    return imatrix
