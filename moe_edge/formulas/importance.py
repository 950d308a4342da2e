"""The importance of input columns: from sums of squares to the mean squares that a quantizer weighs errors with.

An expert that saw few tokens is blended with the mean over all experts of its layer, because its own mean is noise:
(sum_e + a * mean) / (n_e + a), a in tokens. llama.cpp's own imatrix tool leaves such experts unweighted.

Shape suffixes: E experts (1 for a dense matrix), N input columns.
"""

import torch
from torch import Tensor

PRIOR_TOKENS = 64.0  # a: an expert with this many tokens counts half
SMALLEST_SHARE = 1e-6  # of the tensor's mean: a column that no token used still keeps its order of magnitude


def mean_squares(sums_EN: Tensor, counts_E: Tensor) -> Tensor:
    """Blended mean squares [E, N] float32, finite and positive; ones where nothing was seen at all.

    Args:
        sums_EN: float64 sums of squares per expert and column.
        counts_E: float64 tokens per expert.
    """
    total = counts_E.sum()
    if total <= 0 or not sums_EN.isfinite().all() or sums_EN.sum() <= 0:
        return torch.ones_like(sums_EN, dtype=torch.float32)
    mean_1N = sums_EN.sum(dim=0, keepdim=True) / total
    blended_EN = (sums_EN + PRIOR_TOKENS * mean_1N) / (counts_E[:, None] + PRIOR_TOKENS)
    limits = torch.finfo(torch.float32)
    floor = max(SMALLEST_SHARE * float(mean_1N.mean()), limits.tiny)
    return blended_EN.clamp(floor, limits.max).float()
