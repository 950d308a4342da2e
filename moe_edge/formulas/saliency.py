"""Saliency: how much an expert matters, as pure functions of the sums that one profile pass collects.

Why sums: every score below is a ratio or a product of five streaming sums, so one pass of the teacher serves every
criterion, every pruning ratio and every budget. f_e(x) is an expert's raw output, g_e(x) the weight with which the
model itself mixes it in (renormalised over the top-k exactly when the model does that: the observer reads the model's
own weights), T_e the tokens that were routed to expert e. Scores are >= 0, higher is kept; an expert that no token
reached scores 0, the lowest value, in every criterion.

Shape suffixes: L MoE layers, E experts, D model.
"""

from typing import Protocol

from torch import Tensor


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


def man(stats: RoutedSums) -> Tensor:
    """S_e = mean_{T_e} ||f_e||_2, free of gate and frequency. [L, E]. "MAN" in arXiv:2606.15716."""
    return per_routed_token(stats.norm_sum_LE, stats.counts_LE)


def msan(stats: RoutedSums) -> Tensor:
    """S_e = mean_{T_e} ||f_e||_2^2. [L, E]. "MSAN" in arXiv:2606.15716."""
    return per_routed_token(stats.norm_sq_sum_LE, stats.counts_LE)


def reap(stats: RoutedSums) -> Tensor:
    """S_e = mean_{T_e} g_e ||f_e||_2. [L, E]. The saliency of REAP (arXiv:2510.13999), g as mixed in."""
    return per_routed_token(stats.gated_norm_sum_LE, stats.counts_LE)
