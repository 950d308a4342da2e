"""How sure a CKA is: a bootstrap over groups of blocks, and what CKA would be if tokens did not matter.

HSIC sums are kept per group of blocks. Drawing groups with replacement and dividing the drawn sums gives the sampling
distribution of the ratio without another pass. Groups hold consecutive blocks, because neighbouring text is alike and
independent draws of single blocks would promise too narrow an interval; with few groups the interval is a rough one.

The null replaces the rows of one of the two feature maps by the same rows in another order: similarity that is left
does not come from what the experts do with a token.

Sources: Efron & Tibshirani 1993, ch. 13 (percentile interval); Song et al. 2012 (JMLR 13, the unbiased HSIC whose
permutation null has mean zero).

Shape suffixes: G groups, B draws, E experts, n tokens of a block, X = n x n.
"""

import torch
from torch import Tensor

from moe_edge.formulas.cka import MIN_BLOCK_TOKENS, u_centred

DRAWS, DRAWS_AT_ONCE = 1000, 50
COVERAGE = 0.95
MAX_GROUPS = 16
MIN_GROUPS = 4  # the spread of fewer than that says nothing


def group_of(block: int, blocks: int) -> int:
    """The group of a block: at most 16 groups of consecutive blocks, as equal as they can be."""
    return block * group_count(blocks) // blocks


def group_count(blocks: int) -> int:
    """How many groups there are; 1 where there is no block, so that the sums have a shape."""
    return min(MAX_GROUPS, max(1, blocks))


def hsic_and_null(gram_Enn: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """HSIC1 of every pair of experts, and of expert i with the shuffled tokens of expert j (zero on average).

    Args:
        gram_Enn: zero-diagonal Gram matrices of one block.
        seed: of the shuffle, which is the same for all experts.

    Returns:
        Two [E, E] float64, the second not symmetric; all zero when the block has fewer than four tokens.
    """
    experts, n = gram_Enn.shape[0], gram_Enn.shape[-1]
    if n < MIN_BLOCK_TOKENS:
        nothing_EE = gram_Enn.new_zeros(experts, experts, dtype=torch.float64)
        return nothing_EE, nothing_EE.clone()
    order_n = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(gram_Enn.device)
    centred_EX = u_centred(gram_Enn).flatten(1)
    shuffled_EX = centred_EX.index_select(1, (order_n[:, None] * n + order_n).flatten())  # one gather beats two
    pairs = n * (n - 3)
    return (centred_EX @ centred_EX.T).double() / pairs, (centred_EX @ shuffled_EX.T).double() / pairs


def cka_ci(
    groups_GEE: Tensor, draws: int = DRAWS, seed: int = 0, coverage: float = COVERAGE
) -> tuple[Tensor, Tensor] | None:
    """The percentile interval of every pair's CKA.

    Args:
        groups_GEE: HSIC1 sums per group of blocks.

    Returns:
        (low_EE, high_EE) float64, NaN where a pair has no evidence; None with fewer than four groups.
    """
    if len(groups_GEE) < MIN_GROUPS:
        return None
    weights_BG, groups_GEE = _draws(len(groups_GEE), draws, seed), groups_GEE.double()
    scale_BE = _scale(weights_BG @ groups_GEE.diagonal(dim1=1, dim2=2))
    bounds = [
        _quantiles(weights_BG @ row_GE / (scale_BE[:, [expert]] * scale_BE), coverage)
        for expert, row_GE in enumerate(groups_GEE.unbind(1))
    ]
    low, high = (torch.stack(side) for side in zip(*bounds, strict=True))
    return low, high


def mean_cka(hsic_EE: Tensor, known_E: Tensor | None = None, variance_E: Tensor | None = None) -> Tensor:
    """The mean CKA over pairs of different experts; pairs without evidence are left out, NaN when none is left.

    Args:
        hsic_EE: any leading axes are kept.
        known_E: bool, the experts that count; None: all.
        variance_E: what divides, where it is not the diagonal of `hsic_EE`: for the null, that of the true sums.
    """
    hsic_EE = hsic_EE.double()
    scale_E = _scale(hsic_EE.diagonal(dim1=-2, dim2=-1) if variance_E is None else variance_E.double())
    cka_EE = hsic_EE / (scale_E.unsqueeze(-1) * scale_E.unsqueeze(-2))
    pairs_EE = ~torch.eye(hsic_EE.shape[-1], dtype=torch.bool, device=hsic_EE.device)
    if known_E is not None:
        pairs_EE = pairs_EE & known_E & known_E.unsqueeze(-1)
    return cka_EE[..., pairs_EE].nanmean(dim=-1)


def mean_cka_ci(
    groups_GEE: Tensor, known_E: Tensor | None = None, draws: int = DRAWS, seed: int = 0, coverage: float = COVERAGE
) -> tuple[float, float] | None:
    """The percentile interval of `mean_cka`.

    Returns:
        (low, high); None with fewer than four groups, or without evidence.
    """
    if len(groups_GEE) < MIN_GROUPS:
        return None
    weights_BG, groups_GEE = _draws(len(groups_GEE), draws, seed), groups_GEE.double()
    parts = [
        mean_cka(torch.einsum("bg,gij->bij", part_bG, groups_GEE), known_E)
        for part_bG in torch.split(weights_BG, DRAWS_AT_ONCE)
    ]
    low, high = _quantiles(torch.cat(parts), coverage)
    return None if bool(low.isnan()) else (float(low), float(high))


def _scale(variance_E: Tensor) -> Tensor:
    """Square roots; NaN where there is no evidence."""
    return torch.where(variance_E > 0, variance_E, torch.nan).sqrt()


def _draws(groups: int, draws: int, seed: int) -> Tensor:
    """How often each group is drawn, [B, G] float64."""
    chosen_BG = torch.randint(groups, (draws, groups), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.one_hot(chosen_BG, groups).sum(dim=1).double()


def _quantiles(values_BX: Tensor, coverage: float) -> Tensor:
    """The two ends of the central interval over draws, [2, X]; draws without evidence are left out."""
    tail = (1 - coverage) / 2
    return values_BX.nanquantile(values_BX.new_tensor([tail, 1 - tail]), dim=0)
