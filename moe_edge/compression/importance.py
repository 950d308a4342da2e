"""What the student's down projections read, for the quantizer: merged, narrowed and folded experts have other neurons.

The profile's importance matrix describes the teacher's neurons. Where an action gave the experts others, compress measures
(or, for narrowing alone, picks out) the mean square of every input column of the new down projections and leaves it in
imatrix.safetensors; the export puts it in the place of the teacher's.

Shape suffixes: L MoE layers, E teacher's experts, K kept experts, F width of the student's experts.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moe_edge.contracts.spec import ModelSpec
from moe_edge.storage.tensor_files import load_tensors, save_tensors

FILE = "imatrix.safetensors"
SCHEMA = "moe-edge/student-imatrix@1"


def save_importance(folder: Path, down_energy: Mapping[int, Tensor]) -> None:
    """Write mean squares [K, F] per layer as one tensor [L, K, F], zeros behind those of a layer with a smaller K; nothing
    where no layer was changed."""
    (folder / FILE).unlink(missing_ok=True)
    if down_energy:
        stacked_LKF = pad_sequence([down_energy[layer] for layer in sorted(down_energy)], batch_first=True)
        save_tensors(folder / FILE, {"expert_down": stacked_LKF.float()}, {"schema": SCHEMA})


def student_imatrix(
    imatrix: Mapping[str, Tensor],
    kept: Mapping[int, Sequence[int]] | None,
    folder: Path,
    spec: ModelSpec | None = None,
) -> tuple[dict[str, Tensor], Mapping[int, Sequence[int]] | None]:
    """The imatrix sums that describe the student of `folder` (compress's), and the choice that is still to be made in them.

    Args:
        kept: decoder layer -> the teacher's experts that the student has; None = all.
        spec: the student's, where its layers may be padded; padding experts have seen nothing.

    Returns:
        As given where compress left nothing and no layer is padded; else the sums of the student's own experts, and None.
    """
    measured, padded = (folder / FILE).is_file(), spec is not None and bool(spec.moe.experts_per_layer)
    if not measured and not padded:
        return dict(imatrix), kept
    layers = range(len(imatrix["expert_count"]))
    chosen = [slice(None)] * len(layers) if kept is None else [list(kept[layer]) for layer in sorted(kept)]
    rows = {name: [imatrix[name][layer][chosen[layer]] for layer in layers] for name in ("expert_in", "expert_count")}
    if measured:
        means_LKF = load_tensors(folder / FILE)[0]["expert_down"].double()
        pairs = zip(means_LKF, rows["expert_count"], strict=True)
        rows["expert_down"] = [mean_KF[: len(count_K)] * count_K.double().unsqueeze(-1) for mean_KF, count_K in pairs]
    else:
        rows["expert_down"] = [imatrix["expert_down"][layer][chosen[layer]] for layer in layers]
    place = _placed(spec) if spec is not None and padded else torch.stack
    return dict(imatrix) | {name: place(found) for name, found in rows.items()}, None


def _placed(spec: ModelSpec) -> Callable[[list[Tensor]], Tensor]:
    """Puts the rows of every layer's experts where the student's are, zeros elsewhere: [L, places, ...]."""

    def place(rows: list[Tensor]) -> Tensor:
        placed = rows[0].new_zeros(len(rows), spec.moe.experts, *rows[0].shape[1:])
        for position, layer in enumerate(spec.moe_layers):
            placed[position, spec.real_experts(layer)] = rows[position]
        return placed

    return place
