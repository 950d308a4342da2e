"""Debiased linear CKA of two feature maps of the same tokens, differentiable: the alignment loss is 1 minus it.

Why its own form: `formulas/cka.py` compares all experts and detaches; a loss wants pairs, a gradient
that does not depend on the features' scale, and no NaN when one side is constant. Rows are normalised,
so that no massive activation decides; tokens that act as attention sinks must be dropped before.

Sources: Song et al. 2012 (JMLR 13, eq. 5, unbiased HSIC) in the U-centred form of Szekely & Rizzo 2014;
Kornblith et al. 2019 (arXiv 1905.00414) for CKA.

Shape suffixes: S tokens of a row, T tokens, D and J widths of the two feature maps, E experts, X = T x T.
"""

import torch
from torch import Tensor

MIN_TOKENS = 4  # the estimate divides by T (T - 3)
EPS = 1e-12
FLAT = 1e-5  # spread of similarities (cosines) below which a feature map counts as constant
SINK_FACTOR = 10.0


def u_centred_gram(features_TD: Tensor) -> Tensor:
    """The U-centred Gram matrix of the row-normalised features, float32 at least, diagonal 0, [T, T].

    Leading axes are kept: [..., T, D] gives [..., T, T].
    """
    features_TD = features_TD.to(torch.promote_types(features_TD.dtype, torch.float32))
    norm_T1 = torch.sqrt(features_TD.square().sum(-1, keepdim=True) + EPS)
    unit_TD = features_TD / norm_T1
    tokens = unit_TD.shape[-2]
    off_diagonal_TT = 1 - torch.eye(tokens, dtype=unit_TD.dtype, device=unit_TD.device)
    gram_TT = (unit_TD @ unit_TD.mT) * off_diagonal_TT
    row_T = gram_TT.sum(-1) / (tokens - 2)
    mean = row_T.sum(-1, keepdim=True).unsqueeze(-1) / (tokens - 1)
    return (gram_TT - row_T.unsqueeze(-2) - row_T.unsqueeze(-1) + mean) * off_diagonal_TT


def hsic_triple(x_TD: Tensor, y_TJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(HSIC(x, y), HSIC(x, x), HSIC(y, y)), unbiased up to their common factor T (T - 3); leading axes are kept.

    Sums over blocks of equally many tokens may be divided afterwards (Nguyen et al. 2021, eq. 3).

    Raises:
        ValueError: fewer than four tokens, or not the same tokens.
    """
    if x_TD.shape[:-1] != y_TJ.shape[:-1] or x_TD.shape[-2] < MIN_TOKENS:
        raise ValueError(f"CKA needs the same tokens, at least 4: {x_TD.shape} and {y_TJ.shape}")
    k_TT, l_TT = u_centred_gram(x_TD), u_centred_gram(y_TJ)
    cross, own_x, own_y = ((a * b).sum((-2, -1)) for a, b in ((k_TT, l_TT), (k_TT, k_TT), (l_TT, l_TT)))
    return cross, own_x, own_y


def cka_pair(x_TD: Tensor, y_TJ: Tensor) -> Tensor:
    """Debiased linear CKA, a scalar per leading axis; about 0 for unrelated features, 1 for equal ones up to rotation.

    Where a side carries no variance the value and its gradient vanish instead of being 0/0.
    """
    cross, own_x, own_y = hsic_triple(x_TD, y_TJ)
    floor = _flat_energy(x_TD.shape[-2])
    value: Tensor = cross / torch.sqrt(own_x.clamp_min(floor) * own_y.clamp_min(floor))
    return value


def mean_pairwise_cka(features_ETD: Tensor) -> Tensor:
    """Mean of `cka_pair` over all pairs of different experts, a scalar.

    Raises:
        ValueError: fewer than two experts or four tokens.
    """
    experts, tokens = features_ETD.shape[:2]
    if experts < 2 or tokens < MIN_TOKENS:
        raise ValueError(f"pairwise CKA needs 2 experts and 4 tokens at least: {tuple(features_ETD.shape)}")
    centred_EX = u_centred_gram(features_ETD).flatten(1)
    hsic_EE = centred_EX @ centred_EX.T
    scale_E = hsic_EE.diagonal().clamp_min(_flat_energy(tokens)).rsqrt()
    cka_EE = hsic_EE * scale_E.unsqueeze(0) * scale_E.unsqueeze(1)
    value: Tensor = (cka_EE.sum() - cka_EE.diagonal().sum()) / (experts * (experts - 1))
    return value


def _flat_energy(tokens: int) -> float:
    """The HSIC of a feature map with itself below which it counts as constant."""
    return (FLAT * tokens) ** 2


def usable_tokens(hidden_SD: Tensor, valid_S: Tensor | None = None) -> Tensor:
    """True for the tokens of one row that may enter a comparison of features, [S].

    Not position 0, no norm above 10 medians (attention sinks), no padding.

    Args:
        valid_S: bool, False on padding at the end; None: there is none.
    """
    norm_S = torch.linalg.vector_norm(hidden_SD.float(), dim=-1)
    valid_S = torch.ones_like(norm_S, dtype=torch.bool) if valid_S is None else valid_S
    median = norm_S.where(valid_S, torch.nan).nanmedian()
    usable_S: Tensor = valid_S & (norm_S <= SINK_FACTOR * median)
    usable_S[0] = False
    return usable_S


def kept_tokens(hidden_SD: Tensor, valid_S: Tensor | None = None) -> Tensor:
    """Indices of the `usable_tokens` of one row."""
    kept: Tensor = usable_tokens(hidden_SD, valid_S).nonzero().squeeze(-1)
    return kept
