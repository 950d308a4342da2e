"""Ridge regression in the two forms that compression needs: a correction of a matrix, and a map of low rank.

Both minimise ||target - inputs M^T||^2 + lambda ||M||^2 with lambda = ridge x (mean square of an input column, summed over
tokens), so that `ridge` is a pure number: at 1 a matrix fitted to whitened inputs is halved. Numbers are solved in float64,
because Gram matrices of activations are badly conditioned.

Shape suffixes: T tokens, A inputs, D outputs, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def ridge_strength(blocks: Sequence[Tensor], ridge: float) -> float:
    """lambda: `ridge` times the mean, over the columns of all blocks of inputs, of the sum of squares."""
    energy = sum(float(inputs_NA.double().square().sum()) for inputs_NA in blocks)
    return ridge * energy / max(sum(inputs_NA.shape[1] for inputs_NA in blocks), 1)


Block = tuple[Tensor, Tensor]  # the tokens that some inputs belong to [N], and the inputs [N, A]


def joint_ridge_maps(blocks: Sequence[Block], target_TD: Tensor, ridges: Sequence[float]) -> list[list[Tensor]]:
    """For each ridge the maps M_b, one per block, whose sum over blocks comes closest to the target.

    One regression on the blocks side by side, in which a token that is no part of a block has zeros there. Solved over
    inputs or over tokens, whichever are fewer, so that it stays small for any number of blocks.

    Args:
        blocks: tokens are indices into `target_TD`, each at most once per block.

    Returns:
        Per ridge and block (D, A), float64; zero where the inputs are zero.
    """
    wide = [(token_N, inputs_NA.double()) for token_N, inputs_NA in blocks]
    columns, target_TD = sum(inputs_NA.shape[1] for _, inputs_NA in wide), target_TD.double()
    strength = ridge_strength([inputs_NA for _, inputs_NA in wide], 1.0)
    if strength == 0:
        return [[inputs_NA.new_zeros(target_TD.shape[1], inputs_NA.shape[1]) for _, inputs_NA in wide] for _ in ridges]
    over_tokens = len(target_TD) < columns
    gram = _token_gram(wide, len(target_TD)) if over_tokens else _input_gram(wide, len(target_TD))
    right = target_TD if over_tokens else torch.cat([inputs_NA.T @ target_TD[token_N] for token_N, inputs_NA in wide])
    maps = []
    for ridge in ridges:
        shifted = gram.clone()
        shifted.diagonal().add_(ridge * strength)
        solution = torch.cholesky_solve(right, torch.linalg.cholesky(shifted))
        if over_tokens:
            maps.append([solution[token_N].T @ inputs_NA for token_N, inputs_NA in wide])
        else:
            parts = torch.split(solution, [inputs_NA.shape[1] for _, inputs_NA in wide])
            maps.append([part.T for part in parts])
    return maps


def _token_gram(blocks: Sequence[Block], tokens: int) -> Tensor:
    """Sum over blocks of the products between tokens, [T, T]."""
    gram_TT = blocks[0][1].new_zeros(tokens, tokens)
    for token_N, inputs_NA in blocks:
        gram_TT[token_N.unsqueeze(1), token_N] += inputs_NA @ inputs_NA.T
    return gram_TT


def _input_gram(blocks: Sequence[Block], tokens: int) -> Tensor:
    """The products between all inputs of all blocks."""
    side_by_side = []
    for token_N, inputs_NA in blocks:
        side_by_side.append(inputs_NA.new_zeros(tokens, inputs_NA.shape[1]).index_copy(0, token_N, inputs_NA))
    inputs_TA = torch.cat(side_by_side, dim=1)
    return inputs_TA.T @ inputs_TA


def ridge_maps(inputs_TA: Tensor, target_TD: Tensor, ridges: Sequence[float]) -> list[Tensor]:
    """For each ridge the M of shape (D, A) with inputs M^T closest to the target, float64; zero where the inputs are zero.

    As a correction: pass target - inputs W^T and add the result to W. Then the ridge pulls towards W, not towards 0, and W
    stays where the tokens say nothing.
    """
    everyone_T = torch.arange(len(inputs_TA), device=inputs_TA.device)
    return [maps[0] for maps in joint_ridge_maps([(everyone_T, inputs_TA)], target_TD, ridges)]


def ridge_map(inputs_TA: Tensor, target_TD: Tensor, ridge: float) -> Tensor:
    """`ridge_maps` for one ridge."""
    return ridge_maps(inputs_TA, target_TD, [ridge])[0]


def low_rank_map(gram_AA: Tensor, products_AD: Tensor, rank: int, strength: float) -> tuple[Tensor, Tensor]:
    """The best M = left right of the given rank under the same objective (reduced-rank regression, Izenman 1975).

    The objective exceeds its least value, at the ridge solution M*, by tr (M - M*) (X^T X + lambda) (M - M*)^T, so the best
    M of rank R is M* projected on the R first eigenvectors of M* (X^T X + lambda) M*^T = M* X^T target.

    Args:
        gram_AA: X^T X of the inputs, float64.
        products_AD: X^T target, float64.
        strength: lambda, see `ridge_strength`; 0 where there are no inputs, and then the map is zero.

    Returns:
        (left_DR, right_RA), float64; fewer directions than `rank` are filled up with zeros.
    """
    inputs, outputs = products_AD.shape
    left_DR, right_RA = products_AD.new_zeros(outputs, rank), products_AD.new_zeros(rank, inputs)
    if strength == 0:
        return left_DR, right_RA
    shifted_AA = gram_AA.clone()
    shifted_AA.diagonal().add_(strength)
    full_DA = torch.cholesky_solve(products_AD, torch.linalg.cholesky(shifted_AA)).T
    directions_DR = _first_directions(full_DA, products_AD, rank)
    left_DR[:, : directions_DR.shape[1]] = directions_DR
    right_RA[: directions_DR.shape[1]] = directions_DR.T @ full_DA
    return left_DR, right_RA


def _first_directions(full_DA: Tensor, products_AD: Tensor, rank: int) -> Tensor:
    """Orthonormal eigenvectors [D, <= R] of the largest eigenvalues of full products, a symmetric matrix of rank <= A.

    Where A < D the problem is moved into the column space of `full_DA`, which holds every one that counts.
    """
    if full_DA.shape[1] < len(full_DA):
        basis_DA, factor_AA = torch.linalg.qr(full_DA)
        inner_AA = factor_AA @ (products_AD @ basis_DA)
    else:
        basis_DA, inner_AA = None, full_DA @ products_AD
    found: Tensor = torch.linalg.eigh((inner_AA + inner_AA.T) / 2).eigenvectors.flip(1)[:, :rank]
    return found if basis_DA is None else basis_DA @ found
