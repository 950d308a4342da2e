"""statistics.safetensors: what one calibration pass learnt; every later decision is a function of this file.

Sums are float64 over all calibration tokens; means are left to the reader (`sum / counts`), so that a zero count
stays visible as "no evidence". The file's header holds one JSON entry: two entries would be written in an arbitrary
order.

The axis L counts the MoE layers in order; `meta["moe_layers"]` holds the decoder layer of each, which differs where a
model begins with dense layers. "Evidence tokens" are the tokens of the CKA blocks, sinks left out: they ran through
every expert of every layer.

Shape suffixes: L MoE layers, A all decoder layers, E experts, D model width, F expert width, G groups of blocks.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_edge.contracts.errors import InputRejected
from moe_edge.storage.tensor_files import load_tensors, save_tensors

STATISTICS_SCHEMA = "moe-edge/statistics@2"
IMATRIX_PREFIX = "imatrix."


@dataclass(frozen=True)
class Statistics:
    """What the teacher did on the calibration set. "Routed" means: over the tokens that the router sent to the
    expert."""

    counts_LE: Tensor  # int64, routed tokens
    gate_sum_LE: Tensor  # sum of g, the weight that the model multiplies the output with
    norm_sum_LE: Tensor  # sum of ||f||, f the expert's raw output
    norm_sq_sum_LE: Tensor  # sum of ||f||^2
    gated_norm_sum_LE: Tensor  # sum of g ||f||
    norm_max_LE: Tensor  # largest ||f||
    out_sum_LED: Tensor  # sum of f
    out_sq_sum_LED: Tensor  # sum of f^2 per component
    router_entropy_L: Tensor  # mean entropy of the softmax over all experts, nats
    coroute_LEE: Tensor  # int64, tokens routed to both; the diagonal is counts_LE
    gate_mass_L: Tensor  # mean over tokens of the sum of the chosen weights
    hsic_LEE: Tensor  # debiased HSIC between experts' outputs, summed over blocks
    gated_hsic_LEE: Tensor  # the same, rows scaled by the softmax gate
    hsic_groups_GLEE: Tensor  # float32, hsic_LEE in parts: the sum over g of it; for a bootstrap over blocks
    null_hsic_LEE: Tensor  # debiased HSIC of expert i with the shuffled rows of expert j: what chance gives
    layer_hsic_LL: Tensor  # debiased HSIC between the layers' residual outputs
    sink_share_L: Tensor  # dropped share of the CKA tokens
    loo_sq_sum_LE: Tensor  # sum of ||y - y_without_e||^2, y the routed output, e removed and its tokens routed again
    loo_counts_LE: Tensor  # int64, the terms of that sum: evidence tokens that had chosen e
    out_energy_L: Tensor  # sum of ||y||^2 over all evidence tokens
    weight_mean_abs_LE: Tensor  # mean |w| over all weights of an expert
    weight_rms_LE: Tensor  # root of the mean w^2
    cka_tokens: int  # tokens that ran through every expert
    tokens: int  # calibration tokens
    # Sums of squares per input column. Of all A decoder layers, zero where a layer has no such matrix: attention_in
    # [A,D], attention_o [A,heads*head_dim], ffn_in [A,D], shared_down [A,FS] and the like (models/taps.py); of the MoE
    # layers expert_in [L,E,D], expert_down [L,E,F]; head_in [D]. Counts: expert_count [L,E], dense_count [].
    imatrix: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)  # moe_layers, teacher digest, calibration digest, ...

    def save(self, path: Path) -> None:
        """Write the file beside and rename it."""
        tensors = {name: getattr(self, name) for name in TENSOR_FIELDS}
        tensors |= {IMATRIX_PREFIX + name: tensor for name, tensor in self.imatrix.items()}
        header = {"schema": STATISTICS_SCHEMA, "cka_tokens": self.cka_tokens, "tokens": self.tokens, "meta": self.meta}
        save_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read a file that `save` wrote.

        Raises:
            InputRejected: the file is unreadable, not of this schema, or its numbers cannot be what a pass counted.
        """
        tensors, header = load_tensors(path)
        if header.get("schema") != STATISTICS_SCHEMA:
            raise InputRejected(
                "not a statistics file of this version",
                where=str(path),
                why=f"expected schema {STATISTICS_SCHEMA}, found {header.get('schema')}",
                next_command="moe-edge profile TEACHER --fresh",
            )
        imatrix = {
            name.removeprefix(IMATRIX_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(IMATRIX_PREFIX)
        }
        if fault := _fault(tensors, imatrix, header):
            raise InputRejected(
                "the statistics cannot be used",
                where=str(path),
                why=fault,
                next_command="moe-edge profile TEACHER --fresh",
            )
        plain = {name: tensors[name] for name in TENSOR_FIELDS}
        return cls(
            **plain, imatrix=imatrix, cka_tokens=header["cka_tokens"], tokens=header["tokens"], meta=header["meta"]
        )


def _fault(tensors: dict[str, Tensor], imatrix: dict[str, Tensor], header: dict[str, Any]) -> str | None:
    """The first thing that no pass over a teacher can have written; None where everything is in order."""
    for name in ("cka_tokens", "tokens"):
        count = header.get(name)
        if type(count) is not int or count < 0:
            return f"{name} is {count!r}, expected a count"
    if not isinstance(header.get("meta"), dict):
        return "meta is no mapping"
    if missing := [name for name in TENSOR_FIELDS if name not in tensors]:
        return f"{', '.join(missing)} missing"
    sizes: dict[str, int] = {}
    for name in TENSOR_FIELDS:
        if fault := _shape_fault(name, tensors[name], sizes):
            return fault
    signed = {name for name in TENSOR_FIELDS if "hsic" in name} | {"out_sum_LED"}
    for name, tensor in [*((name, tensors[name]) for name in TENSOR_FIELDS), *imatrix.items()]:
        if not torch.isfinite(tensor).all():
            return f"{name} holds NaN or infinity"
        if name not in signed and (tensor < 0).any():
            return f"{name} holds negative numbers"
    return None


def _shape_fault(name: str, tensor: Tensor, sizes: dict[str, int]) -> str | None:
    """Do the axes that a field's suffix names agree with those seen before? Fills `sizes`."""
    axes = name.rpartition("_")[2]
    if tensor.ndim != len(axes):
        return f"{name} has shape {tuple(tensor.shape)}, expected the axes {axes}"
    if name in COUNT_FIELDS and tensor.dtype != torch.int64:
        return f"{name} is {tensor.dtype}, expected int64"
    if name not in COUNT_FIELDS and not tensor.is_floating_point():
        return f"{name} is {tensor.dtype}, expected floating point"
    for axis, size in zip(axes, tensor.shape, strict=True):
        if sizes.setdefault(axis, size) != size:
            return f"{name} has shape {tuple(tensor.shape)}, but its axis {axis} is {sizes[axis]} elsewhere"
    return None


COUNT_FIELDS = frozenset({"counts_LE", "coroute_LEE", "loo_counts_LE"})
TENSOR_FIELDS = tuple(entry.name for entry in fields(Statistics) if entry.type in (Tensor, "Tensor"))
