"""Debiased minibatch CKA between all experts of a layer at once, and the mask that keeps attention sinks out of it.

Linear CKA says whether two feature maps of the same tokens are equal up to rotation and scale. The plug-in estimate
is useless here: with d features and n tokens it reports about d/(d+n) for independent experts. So HSIC is estimated
without bias per block of tokens, summed over blocks, and divided once at the end. Rows are L2-normalised (cosine
kernel) and sink tokens are dropped first, because two tokens with a shared massive activation alone lift the CKA of
independent experts to 0.99.

Sources: Song et al. 2012 (JMLR 13, eq. 5, the unbiased HSIC); Nguyen et al. 2021 (arXiv 2010.15327, eq. 3, sums
over minibatches); Kornblith et al. 2019 (arXiv 1905.00414, CKA).

Shape suffixes: E experts (or any set of feature maps), N tokens of a block, T tokens, D features.
"""

import torch
from torch import Tensor

MIN_BLOCK_TOKENS = 4  # HSIC1 divides by n (n - 3)
SINK_FACTOR = 10.0


def normalise_rows(features_ND: Tensor) -> Tensor:
    """Each row divided by its L2 norm, in float32 at least; a row of zeros stays zero."""
    features_ND = features_ND.to(torch.promote_types(features_ND.dtype, torch.float32))
    norm_N1 = torch.linalg.vector_norm(features_ND, dim=-1, keepdim=True)
    return features_ND / torch.where(norm_N1 > 0, norm_N1, torch.ones_like(norm_N1))


def sink_mask(hidden_TD: Tensor, position_T: Tensor, factor: float = SINK_FACTOR) -> Tensor:
    """True where a token must not enter CKA: position 0, or a norm above `factor` times the median norm.

    Args:
        hidden_TD: what the layer reads (its input or the residual stream); any float type.
        position_T: each token's position in its row.
    """
    norm_T = torch.linalg.vector_norm(hidden_TD.float(), dim=-1)
    sink_T: Tensor = (position_T == 0) | (norm_T > factor * norm_T.median())
    return sink_T


def gram(features_ND: Tensor) -> Tensor:
    """K with a zero diagonal: `features features^T`, the K-tilde of Song'12. Shape [N, N], or [E, N, N] from [E, N,
    D]."""
    kernel_NN = features_ND @ features_ND.mT
    kernel_NN.diagonal(dim1=-2, dim2=-1).zero_()
    return kernel_NN


def gate_gram(gram_ENN: Tensor, gate_EN: Tensor) -> Tensor:
    """The Gram matrices of the same features with row t scaled by `gate[e, t]`, without a second matrix product."""
    return (gram_ENN * gate_EN.unsqueeze(-1)).mul_(gate_EN.unsqueeze(-2))


def hsic_from_grams(gram_ENN: Tensor) -> Tensor:
    """HSIC1 of every pair of zero-diagonal Gram matrices (Song'12 eq. 5; may be negative).

    `HSIC1(K, L) = [tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) (K1)'(L1)] / (n (n-3))`, computed as the inner
    product of the U-centred matrices (Szekely & Rizzo 2014, prop. 1): the same number, but the common part of all
    similarities is taken away before it is squared, so that float32 Grams suffice.

    Returns:
        [E, E] float64, all zero when the block has fewer than four tokens (no evidence).
    """
    experts, n = gram_ENN.shape[0], gram_ENN.shape[-1]
    if n < MIN_BLOCK_TOKENS:
        return gram_ENN.new_zeros(experts, experts, dtype=torch.float64)
    flat_EF = u_centred(gram_ENN).view(experts, n * n)
    return (flat_EF @ flat_EF.T).double() / (n * (n - 3))


def u_centred(gram_ENN: Tensor) -> Tensor:
    """Zero-diagonal Gram matrices without their row and column means: off the diagonal every row sums to zero."""
    n = gram_ENN.shape[-1]
    row_EN = gram_ENN.sum(dim=-1) / (n - 2)
    shift_EN = row_EN - row_EN.sum(dim=-1, keepdim=True) / (n - 1)
    centred_ENN = (gram_ENN - row_EN.unsqueeze(-1)).sub_(shift_EN.unsqueeze(-2))
    centred_ENN.diagonal(dim1=-2, dim2=-1).zero_()
    return centred_ENN


def hsic_all_pairs(features_END: Tensor) -> Tensor:
    """HSIC1 of all expert pairs on one block of n tokens; add the results of all blocks, then `cka_from_hsic`.

    Args:
        features_END: features of the same n tokens under every expert; normalise rows and drop sinks before.

    Returns:
        [E, E] float64.
    """
    return hsic_from_grams(gram(features_END))


def hsic_across(gram_ENN: Tensor, gram_JNN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """HSIC1 of every feature map of one set with every one of another, on one block of the same n tokens.

    Add the results of all blocks, then `cka_across`. Zero where the block has fewer than four tokens (no evidence).

    Args:
        gram_ENN, gram_JNN: zero-diagonal Gram matrices; they are overwritten.

    Returns:
        (across [E, J], of each map of the first set with itself [E], of the second [J]), float64.
    """
    n = gram_ENN.shape[-1]
    if n < MIN_BLOCK_TOKENS:
        shapes = ((len(gram_ENN), len(gram_JNN)), (len(gram_ENN),), (len(gram_JNN),))
        across, own, other = (gram_ENN.new_zeros(shape, dtype=torch.float64) for shape in shapes)
        return across, own, other
    own_EF, other_JF = (u_centred(gram).flatten(1) for gram in (gram_ENN, gram_JNN))
    sums = (own_EF @ other_JF.T, own_EF.square().sum(dim=1), other_JF.square().sum(dim=1))
    across, own, other = (part.double() / (n * (n - 3)) for part in sums)
    return across, own, other


def cka_across(across_EJ: Tensor, own_E: Tensor, other_J: Tensor) -> Tensor:
    """CKA from the sums of `hsic_across`, [E, J]; NaN where a side has no variance (no evidence)."""
    scale_EJ = torch.sqrt(own_E.clamp(min=0).unsqueeze(-1) * other_J.clamp(min=0).unsqueeze(-2))
    return torch.where(scale_EJ > 0, across_EJ / scale_EJ, torch.nan)


def cka_from_hsic(hsic_EE: Tensor) -> Tensor:
    """CKA from summed HSIC1: `H_ij / sqrt(H_ii H_jj)`, the ratio of sums (Nguyen'21 eq. 2), shape as given.

    Where an expert has no evidence (a diagonal that is not positive) its row and column are NaN: unknown, not
    dissimilar. The debiased estimate may leave [0, 1] slightly; clip it before using it as a similarity.
    """
    hsic_EE = hsic_EE.double()
    variance_E = hsic_EE.diagonal(dim1=-2, dim2=-1)
    variance_E = torch.where(variance_E > 0, variance_E, torch.full_like(variance_E, torch.nan))
    return hsic_EE / torch.sqrt(variance_E.unsqueeze(-1) * variance_E.unsqueeze(-2))
