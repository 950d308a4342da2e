"""Debiased linear CKA of two feature maps of the same tokens, differentiable: the alignment loss is 1 minus it.

Why its own form: `formulas/cka.py` compares all experts and detaches; a loss wants one pair, a gradient
that does not depend on the features' scale, and no NaN when one side is constant. Rows are normalised,
so that no massive activation decides; tokens that act as attention sinks must be dropped before.

Sources: Song et al. 2012 (JMLR 13, eq. 5, unbiased HSIC) in the U-centred form of Szekely & Rizzo 2014;
Kornblith et al. 2019 (arXiv 1905.00414) for CKA.

Shape suffixes: T tokens, D and E widths of the two feature maps.
"""

import torch
from torch import Tensor

MIN_TOKENS = 4  # the estimate divides by T (T - 3)
EPS = 1e-12
FLAT = 1e-5  # spread of similarities (cosines) below which a feature map counts as constant
SINK_FACTOR = 10.0


def u_centred_gram(features_TD: Tensor) -> Tensor:
    """The U-centred Gram matrix of the row-normalised features, float32 at least, diagonal 0, [T, T]."""
    features_TD = features_TD.to(torch.promote_types(features_TD.dtype, torch.float32))
    norm_T1 = torch.sqrt(features_TD.square().sum(-1, keepdim=True) + EPS)
    unit_TD = features_TD / norm_T1
    tokens = unit_TD.shape[0]
    off_diagonal_TT = 1 - torch.eye(tokens, dtype=unit_TD.dtype, device=unit_TD.device)
    gram_TT = (unit_TD @ unit_TD.T) * off_diagonal_TT
    row_T = gram_TT.sum(-1) / (tokens - 2)
    mean = row_T.sum() / (tokens - 1)
    return (gram_TT - row_T.unsqueeze(0) - row_T.unsqueeze(1) + mean) * off_diagonal_TT


def hsic_triple(x_TD: Tensor, y_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(HSIC(x, y), HSIC(x, x), HSIC(y, y)), unbiased up to their common factor T (T - 3).

    Sums over blocks of equally many tokens may be divided afterwards (Nguyen et al. 2021, eq. 3).

    Raises:
        ValueError: fewer than four tokens, or not the same tokens.
    """
    if x_TD.shape[0] != y_TE.shape[0] or x_TD.shape[0] < MIN_TOKENS:
        raise ValueError(f"CKA needs the same tokens, at least 4: {x_TD.shape} and {y_TE.shape}")
    k_TT, l_TT = u_centred_gram(x_TD), u_centred_gram(y_TE)
    return (k_TT * l_TT).sum(), k_TT.square().sum(), l_TT.square().sum()


def cka_pair(x_TD: Tensor, y_TE: Tensor) -> Tensor:
    """Debiased linear CKA, a scalar; about 0 for unrelated features, 1 for equal ones up to rotation.

    Where a side carries no variance the value and its gradient vanish instead of being 0/0.
    """
    cross, own_x, own_y = hsic_triple(x_TD, y_TE)
    floor = (FLAT * x_TD.shape[0]) ** 2
    value: Tensor = cross / torch.sqrt(own_x.clamp_min(floor) * own_y.clamp_min(floor))
    return value


def kept_tokens(hidden_TD: Tensor) -> Tensor:
    """Indices of the tokens of one row that may enter CKA: not position 0, no norm above 10 medians."""
    norm_T = torch.linalg.vector_norm(hidden_TD.float(), dim=-1)
    keep_T = norm_T <= SINK_FACTOR * norm_T.median()
    keep_T[0] = False
    kept: Tensor = keep_T.nonzero().squeeze(-1)
    return kept
