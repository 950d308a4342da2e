"""Super experts: the few whose outputs are so large that the model's attention sinks hang on them.

Removing three of the 6144 experts of Qwen3-30B-A3B breaks it (arXiv:2507.23279), and no mean over tokens shows them,
because they speak up at a handful of tokens. They are found by their largest output and kept under every criterion.

Shape suffixes: L MoE layers, E experts.
"""

from typing import Protocol

import torch
from torch import Tensor

QUANTILE = 0.995
SHARE_OF_LARGEST = 0.1


class OutputMaxima(Protocol):
    """What is read of the profile's statistics."""

    @property
    def norm_max_LE(self) -> Tensor: ...


def super_experts(stats: OutputMaxima) -> Tensor:
    """True where an expert's largest output norm exceeds the 99.5th percentile of all experts of the model and a tenth
    of the largest of all. [L, E] bool.

    The definition of arXiv:2507.23279 (section 3) with the L2 norm of the expert's output in place of its largest
    component, and all layers searched. By construction at most one expert in two hundred passes (one at most in a model
    of fewer than two hundred), whether or not the model hangs on it: the guard is cheap, not a diagnosis.
    """
    largest_LE = stats.norm_max_LE.double()
    threshold = torch.quantile(largest_LE.flatten(), QUANTILE)
    found_LE: Tensor = (largest_LE > threshold) & (largest_LE > SHARE_OF_LARGEST * largest_LE.max())
    return found_LE
