"""Saliency: how much an expert matters, as pure functions of the sums that one profile pass collects.

Why sums: every score below is a ratio or a product of a few streaming sums, so one pass of the teacher serves every
criterion, every pruning ratio and every budget. f_e(x) is an expert's raw output, g_e(x) the weight with which the
model itself mixes it in (renormalised over the top-k exactly when the model does that: the observer reads the model's
own weights), T_e the tokens that were routed to expert e. Scores are >= 0, higher is kept; an expert that no token
reached scores 0, the lowest value, in every criterion that reads data (`aimer` alone reads weights).

`super_experts` finds the few that are kept under every criterion, because their outputs are so large that the model's
attention sinks hang on them. Removing three of the 6144 experts of Qwen3-30B-A3B breaks it (arXiv:2507.23279), and no mean
over tokens shows them, because they speak up at a handful of tokens: they are found by their largest output.

Shape suffixes: L MoE layers, E experts, D model.
"""

from typing import Protocol

import torch
from torch import Tensor

QUANTILE = 0.995
SHARE_OF_LARGEST = 0.1


class RoutedSums(Protocol):
    """What a criterion may read; the profile's statistics have these fields (float64, counts int64)."""

    @property
    def counts_LE(self) -> Tensor: ...
    @property
    def gate_sum_LE(self) -> Tensor: ...
    @property
    def norm_sum_LE(self) -> Tensor: ...
    @property
    def norm_sq_sum_LE(self) -> Tensor: ...
    @property
    def gated_norm_sum_LE(self) -> Tensor: ...
    @property
    def hsic_LEE(self) -> Tensor: ...
    @property
    def gated_hsic_LEE(self) -> Tensor: ...
    @property
    def loo_sq_sum_LE(self) -> Tensor: ...
    @property
    def loo_counts_LE(self) -> Tensor: ...
    @property
    def weight_mean_abs_LE(self) -> Tensor: ...
    @property
    def weight_rms_LE(self) -> Tensor: ...
    @property
    def tokens(self) -> int: ...


def per_routed_token(sum_LE: Tensor, counts_LE: Tensor) -> Tensor:
    """sum / |T_e|, and 0 where nothing was routed (0/0 is no evidence, and no evidence ranks last). [L, E] float64."""
    counts = counts_LE.double()
    return (sum_LE.double() / counts.clamp(min=1)).where(counts > 0, 0.0)


def frequency(stats: RoutedSums) -> Tensor:
    """S_e = |T_e|: routed tokens. [L, E]. The frequency baseline of REAP (arXiv:2510.13999)."""
    return stats.counts_LE.double()


def gate_mass(stats: RoutedSums) -> Tensor:
    """S_e = sum_{T_e} g_e: total gate weight. [L, E]. The soft count of SEER-MoE (arXiv:2404.05089)."""
    return stats.gate_sum_LE.double()


def ean(stats: RoutedSums) -> Tensor:
    """S_e = sum_{T_e} ||f_e||_2: expert activation norm. [L, E]. "EAN" in REAP (arXiv:2510.13999)."""
    return stats.norm_sum_LE.double()


def gated_ean(stats: RoutedSums) -> Tensor:
    """S_e = sum_{T_e} g_e ||f_e||_2: what an expert adds to the residual stream, over all tokens. [L, E].

    "weighted_ean_sum" in the code of REAP (arXiv:2510.13999), which is its mean. Exact for experts whose outputs are
    independent and whose tokens nobody takes over."""
    return stats.gated_norm_sum_LE.double()


def man(stats: RoutedSums) -> Tensor:
    """S_e = mean_{T_e} ||f_e||_2, free of gate and frequency. [L, E]. "MAN" in arXiv:2606.15716."""
    return per_routed_token(stats.norm_sum_LE, stats.counts_LE)


def msan(stats: RoutedSums) -> Tensor:
    """S_e = mean_{T_e} ||f_e||_2^2. [L, E]. "MSAN" in arXiv:2606.15716."""
    return per_routed_token(stats.norm_sq_sum_LE, stats.counts_LE)


def reap(stats: RoutedSums) -> Tensor:
    """S_e = mean_{T_e} g_e ||f_e||_2. [L, E]. The saliency of REAP (arXiv:2510.13999), g as mixed in."""
    return per_routed_token(stats.gated_norm_sum_LE, stats.counts_LE)


def loo_mse(stats: RoutedSums) -> Tensor:
    """S_e = (sum_{t in B_e} ||y_t - y_t without e||^2 / |B_e|) x (|T_e| / all tokens). [L, E].

    Leave-one-out: y is the block's routed output and "without e" means that e is removed and its tokens are routed
    again. B_e are the tokens of the evidence blocks that had chosen e, so the first factor is the mean squared error
    of a displaced token and the second the share of all calibration tokens that would be displaced: together the
    expected squared output error per token. This is the "mse" of ModelOpt's Puzzletron (expert_removal_hooks.py) up
    to a factor D that ranks nothing, except that the share is taken from the whole calibration set, where it is
    known better than from the few evidence tokens. An expert without an evidence token scores 0.
    """
    displaced_LE = stats.counts_LE.double() / max(stats.tokens, 1)
    return per_routed_token(stats.loo_sq_sum_LE, stats.loo_counts_LE) * displaced_LE


def aimer(stats: RoutedSums) -> Tensor:
    """S_e = RMS(W_e) / mean|W_e|, over all weights of an expert; reads no data. [L, E].

    AIMER (arXiv:2603.18492) is the inverse, mean|W| / RMS(W), and prunes its highest values ("higher AIMER scores
    are treated as more removable", README of ZongfangLiu/AIMER), so the inverse is kept by its highest here. The sign
    is also what one expects: the ratio is sqrt(2/pi) = 0.80 for the Gaussian of an initialisation and falls as training
    gives weights heavy tails, so a high AIMER marks the expert that has learnt least. It is invariant to scale.
    """
    mean_abs_LE = stats.weight_mean_abs_LE.double()
    return (stats.weight_rms_LE.double() / mean_abs_LE).where(mean_abs_LE > 0, 0.0)  # all zeros: nothing to keep


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
