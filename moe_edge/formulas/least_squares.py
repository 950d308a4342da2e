"""Ridge regression in the two forms that compression needs: a correction of a matrix, and a map of low rank.

Both minimise ||target - inputs M^T||^2 + lambda ||M||^2 with lambda = ridge x (mean square of an input column, summed over
tokens), so that `ridge` is a pure number: at 1 a matrix fitted to whitened inputs is halved. Numbers are solved in float64,
because Gram matrices of activations are badly conditioned.

Shape suffixes: T tokens, A inputs, D outputs, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def ridge_strength(inputs_TA: Tensor, ridge: float) -> float:
    """lambda: `ridge` times the mean over columns of the sum of squares."""
    return ridge * float(inputs_TA.double().square().sum()) / max(inputs_TA.shape[1], 1)


class RidgeProblem:
    """Ridge regression on the same inputs for many targets: the Gram matrix is built once, in float64.

    In the dual form (T x T instead of A x A) when there are fewer tokens than inputs.
    """

    def __init__(self, inputs_TA: Tensor) -> None:
        """Args: inputs_TA: products with a target are taken in their dtype."""
        self.inputs_TA = inputs_TA
        self.dual = len(inputs_TA) < inputs_TA.shape[1]
        rows = inputs_TA.double() if self.dual else inputs_TA.double().T
        self.gram = rows @ rows.T
        self.energy = float(self.gram.diagonal().sum())  # of all inputs, in either form

    def maps(self, target_TD: Tensor, ridges: Sequence[float]) -> list[Tensor]:
        """For each ridge the M of shape (D, A) with inputs M^T closest to the target, float64; zero without inputs."""
        width = self.inputs_TA.shape[1]
        if self.energy == 0:
            return [self.gram.new_zeros(target_TD.shape[1], width) for _ in ridges]
        right = (target_TD if self.dual else self.inputs_TA.T @ target_TD.to(self.inputs_TA.dtype)).double()
        maps = []
        for ridge in ridges:
            shifted = self.gram.clone()
            shifted.diagonal().add_(ridge * self.energy / width)
            solution = torch.cholesky_solve(right, torch.linalg.cholesky(shifted)).T
            maps.append(solution @ self.inputs_TA.double() if self.dual else solution)
        return maps


def ridge_maps(inputs_TA: Tensor, target_TD: Tensor, ridges: Sequence[float]) -> list[Tensor]:
    """For each ridge the M of shape (D, A) with inputs M^T closest to the target, float64; zero where the inputs are zero.

    As a correction: pass target - inputs W^T and add the result to W. Then the ridge pulls towards W, not towards 0, and W
    stays where the tokens say nothing.
    """
    return RidgeProblem(inputs_TA.double()).maps(target_TD, ridges)


def ridge_map(inputs_TA: Tensor, target_TD: Tensor, ridge: float) -> Tensor:
    """`ridge_maps` for one ridge."""
    return ridge_maps(inputs_TA, target_TD, [ridge])[0]


def low_rank_map(inputs_TA: Tensor, target_TD: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """The best M = left right of the given rank under the same objective (reduced-rank regression, Izenman 1975).

    The objective exceeds its least value, at the ridge solution M*, by tr (M - M*) (X^T X + lambda) (M - M*)^T, so the best
    M of rank R is M* projected on the R first eigenvectors of M* (X^T X + lambda) M*^T = M* X^T target.

    Returns:
        (left_DR, right_RA), float64; fewer directions than `rank` are filled up with zeros.
    """
    full_DA = ridge_map(inputs_TA, target_TD, ridge)
    strength_DD = full_DA @ (inputs_TA.double().T @ target_TD.double())
    directions_DR = torch.linalg.eigh((strength_DD + strength_DD.T) / 2).eigenvectors.flip(1)[:, :rank]
    left_DR, right_RA = full_DA.new_zeros(len(full_DA), rank), full_DA.new_zeros(rank, full_DA.shape[1])
    left_DR[:, : directions_DR.shape[1]] = directions_DR
    right_RA[: directions_DR.shape[1]] = directions_DR.T @ full_DA
    return left_DR, right_RA
