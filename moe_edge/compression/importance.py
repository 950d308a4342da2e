"""What the student's down projections read, for the quantizer: merged, narrowed and folded experts have other neurons.

The profile's importance matrix describes the teacher's neurons. Where an action gave the experts others, compress measures
(or, for narrowing alone, picks out) the mean square of every input column of the new down projections and leaves it in
imatrix.safetensors; the export puts it in the place of the teacher's.

Shape suffixes: L MoE layers, E teacher's experts, K kept experts, F width of the student's experts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe_edge.storage.tensor_dict import load_tensors, save_tensors

FILE = "imatrix.safetensors"
SCHEMA = "moe-edge/student-imatrix@1"


def save_importance(folder: Path, down_energy: Mapping[int, Tensor]) -> None:
    """Write mean squares [K, F] per layer as one tensor [L, K, F]; nothing where no layer was changed."""
    (folder / FILE).unlink(missing_ok=True)
    if down_energy:
        stacked_LKF = torch.stack([down_energy[layer] for layer in sorted(down_energy)])
        save_tensors(folder / FILE, {"expert_down": stacked_LKF.float()}, {"schema": SCHEMA})


def student_imatrix(
    imatrix: Mapping[str, Tensor], kept: Mapping[int, Sequence[int]] | None, folder: Path
) -> tuple[dict[str, Tensor], Mapping[int, Sequence[int]] | None]:
    """The imatrix sums that describe the student of `folder` (compress's), and the choice that is still to be made in them.

    Args:
        kept: decoder layer -> the teacher's experts that the student has; None = all.

    Returns:
        As given where compress left nothing; else the sums of the student's own experts, and None.
    """
    if not (folder / FILE).is_file():
        return dict(imatrix), kept
    mean_LKF = load_tensors(folder / FILE)[0]["expert_down"].double()
    layers = range(len(mean_LKF))
    chosen = [slice(None)] * len(mean_LKF) if kept is None else [list(kept[layer]) for layer in sorted(kept)]
    student = dict(imatrix)
    for name in ("expert_in", "expert_count"):
        student[name] = torch.stack([imatrix[name][layer][chosen[layer]] for layer in layers])
    student["expert_down"] = mean_LKF * student["expert_count"].double().unsqueeze(-1)
    return student, None
