"""Importance of every weight column for the quantizer, from the profile's sums of squares of each layer input.

Keys are the neutral ones of the profile: of all decoder layers attention_in [A, D], attention_o, ffn_in, shared_down,
dense_in, dense_down; head_in; of the MoE layers expert_in [L, E, D] and expert_down [L, E, F] with expert_count [L, E].
An expert that saw few tokens borrows from its layer: (sum_e + a m) / (n_e + a) with m the layer's mean square and a = 32
tokens, so that a never-routed expert is weighted by the layer's mean and not by noise.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

PRIOR_TOKENS = 32.0
FLOOR = 1e-3  # share of the mean importance that a dead column keeps
_DENSE = {"ffn_in": "dense_in", "shared_down": "dense_down"}  # a dense layer's block is named as a shared expert is


class Importance:
    """Looks up the weights of a matrix's input columns; knows which teacher experts the student kept."""

    def __init__(
        self,
        imatrix: Mapping[str, Any] | None,
        kept: Mapping[int, list[int]] | None = None,
        moe_layers: Sequence[int] | None = None,
    ) -> None:
        """`kept` and `moe_layers` (None: all) are decoder layers."""
        self._sums = {key: torch.as_tensor(value).double() for key, value in (imatrix or {}).items()}
        self._kept = dict(kept or {})
        self._position = None if moe_layers is None else {layer: at for at, layer in enumerate(moe_layers)}

    def of(self, key: str | None, layer: int | None, expert: int | None = None) -> torch.Tensor | None:
        """Importance [1, C] with mean 1 of a matrix's columns, or None where the profile has nothing to say.

        Args:
            expert: position of the expert in the student, for the per-expert keys.
        """
        if key is not None and layer is not None and self._position is not None and layer not in self._position:
            key = _DENSE.get(key, key)
        if key is None or key not in self._sums:
            return None
        sums = self._sums[key]
        if expert is not None and layer is not None:
            column = self._expert(sums, layer, expert)
        else:
            column = sums if layer is None or sums.dim() == 1 else sums[layer]
        mean = column.mean()
        if not torch.isfinite(mean) or mean <= 0:
            return None
        return (column / mean).clamp(min=FLOOR).float().unsqueeze(0)

    def _expert(self, sums_LEC: torch.Tensor, layer: int, expert: int) -> torch.Tensor:
        position = layer if self._position is None else self._position[layer]
        sums_EC = sums_LEC[position]
        teacher_id = self._kept[layer][expert] if layer in self._kept else expert
        if "expert_count" not in self._sums:
            return sums_EC[teacher_id]
        count_E = self._sums["expert_count"][position]
        mean_C = sums_EC.sum(0) / count_E.sum().clamp(min=1)
        return (sums_EC[teacher_id] + PRIOR_TOKENS * mean_C) / (count_E[teacher_id] + PRIOR_TOKENS)
