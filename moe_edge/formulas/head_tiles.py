"""Logits of a few ids and the log-sum-exp of all others, from the head in tiles of tokens and vocabulary.

A loss on a cached teacher, and the cross-entropy, need no more of a row than that. So a tile of logits is made, summed up
and dropped; the backward pass makes it again and turns it into its part of the gradients at once (the scheme of cut
cross-entropy, arXiv 2411.09009, sections 4.2 and 4.3, here with the teacher's ids and with a temperature). Neither logits
nor their gradient ever exist beyond one tile, whatever the vocabulary; the numbers are those of the plain computation up to
the order of its sums. It costs one more product with the head than `head_loss`, and saves its passes over wide tensors.

Shape suffixes: T tokens, t tokens of a tile, D model, V vocabulary, v its ids in a tile, K kept ids, H temperatures.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_edge.formulas.logit_views import KeptLogits, wide

TILE_TOKENS, TILE_IDS = 512, 4096  # 8 MiB of float32


class _Cells(NamedTuple):
    """Where the kept ids, and the labels, lie in a tile: rows and columns of it, and which of the token's K they are."""

    rows: Tensor
    columns: Tensor
    ranks: Tensor
    label_rows: Tensor
    label_columns: Tensor


class _Tile(NamedTuple):
    tokens: slice
    ids: slice

    def logits(self, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        return wide(hidden_TD[self.tokens] @ weight_VD[self.ids].T)

    def cells(self, ids_TK: Tensor, labels_T: Tensor) -> _Cells:
        start, stop = self.ids.start, self.ids.stop
        ids_tK, labels_t = ids_TK[self.tokens], labels_T[self.tokens]
        rows, ranks = ((ids_tK >= start) & (ids_tK < stop)).nonzero(as_tuple=True)
        (label_rows,) = ((labels_t >= start) & (labels_t < stop)).nonzero(as_tuple=True)
        return _Cells(rows, ids_tK[rows, ranks] - start, ranks, label_rows, labels_t[label_rows] - start)


def _tiles(tokens: int, vocab: int) -> Iterator[_Tile]:
    for first in range(0, vocab, TILE_IDS):
        ids = slice(first, min(first + TILE_IDS, vocab))
        for start in range(0, tokens, TILE_TOKENS):
            yield _Tile(slice(start, min(start + TILE_TOKENS, tokens)), ids)


class _Kept(torch.autograd.Function):
    """(kept_TK, label_T, log_rest_TH) of hidden states and head; labels may be empty."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, ids_TK: Tensor, labels_T: Tensor, heats: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.heats, like = heats, wide(hidden_TD[:0])
        kept_TK, label_T = like.new_zeros(ids_TK.shape), like.new_zeros(labels_T.shape)
        log_rest_TH = like.new_full((len(hidden_TD), len(heats)), -torch.inf)
        for tile in _tiles(len(hidden_TD), len(weight_VD)):
            logits_tv, cells = tile.logits(hidden_TD, weight_VD), tile.cells(ids_TK, labels_T)
            kept_TK[tile.tokens][cells.rows, cells.ranks] = logits_tv[cells.rows, cells.columns]
            label_T[tile.tokens][cells.label_rows] = logits_tv[cells.label_rows, cells.label_columns]
            logits_tv[cells.rows, cells.columns] = -torch.inf
            rest_tH = log_rest_TH[tile.tokens]
            rest_tH.copy_(torch.logaddexp(rest_tH, _log_sums(logits_tv, heats)))
        ctx.save_for_backward(hidden_TD, weight_VD, ids_TK, labels_T, log_rest_TH)
        return kept_TK, label_T, log_rest_TH

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, ids_TK, labels_T, log_rest_TH = ctx.saved_tensors
        slope_TK, slope_T, slope_TH = slopes
        grad_TD = torch.zeros_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for tile in _tiles(len(hidden_TD), len(weight_VD)):
                cells = tile.cells(ids_TK, labels_T)
                sums_tH = log_rest_TH[tile.tokens], slope_TH[tile.tokens]
                slope_tv = _softmax_slope(tile.logits(hidden_TD, weight_VD), *sums_tH, ctx.heats)
                slope_tv[cells.rows, cells.columns] = slope_TK[tile.tokens][cells.rows, cells.ranks]
                slope_tv[cells.label_rows, cells.label_columns] += slope_T[tile.tokens][cells.label_rows]
                slope_tv = slope_tv.to(weight_VD.dtype)
                if grad_TD is not None:
                    grad_TD[tile.tokens].addmm_(slope_tv, weight_VD[tile.ids])
                if grad_VD is not None:
                    grad_VD[tile.ids].addmm_(slope_tv.T, hidden_TD[tile.tokens])
        return grad_TD, grad_VD, None, None, None


def _log_sums(logits_tv: Tensor, heats: Sequence[float]) -> Tensor:
    """log sum exp(z / heat) over a tile's ids, [t, H]; kept ids are -inf in it."""
    return torch.stack([torch.logsumexp(logits_tv if heat == 1.0 else logits_tv / heat, -1) for heat in heats], -1)


def _softmax_slope(logits_tv: Tensor, rest_tH: Tensor, slope_tH: Tensor, heats: Sequence[float]) -> Tensor:
    """sum_h slope_h / heat_h exp(z / heat_h - rest_h): what flows to the logits through the log-sum-exps.

    Overwrites the logits where there is but one temperature.
    """
    parts = []
    for index, heat in enumerate(heats):
        scaled_tv = logits_tv / heat if len(heats) > 1 else logits_tv.div_(heat)
        parts.append(scaled_tv.sub_(rest_tH[:, index, None]).exp_().mul_(slope_tH[:, index, None] / heat))
    return parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])


def kept_logits(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    ids_TK: Tensor,
    temperatures: Sequence[float],
    labels_T: Tensor | None = None,
) -> KeptLogits:
    """What losses on a few ids need of `hidden_TD weight_VD'`, differentiable once.

    Args:
        hidden_TD: final hidden states.
        weight_VD: the head, padding rows already cut off; no bias. Its dtype is computed in.
        ids_TK: unique per token; -1 is no id; K may be 0.
        temperatures: those at which a log-sum-exp will be asked for.
        labels_T: ids whose logits are wanted besides, whether they are among `ids_TK` or not.

    Raises:
        ValueError: a label is no id of the vocabulary.
    """
    if labels_T is not None and len(labels_T) and not 0 <= int(labels_T.min()) <= int(labels_T.max()) < len(weight_VD):
        raise ValueError(f"a label is not among the {len(weight_VD)} ids of the vocabulary")
    labels_T = ids_TK.new_empty(0) if labels_T is None else labels_T
    with torch.autocast(hidden_TD.device.type, enabled=False):
        hidden_TD = hidden_TD.to(weight_VD.dtype)
        kept_TK, label_T, log_rest_TH = _Kept.apply(hidden_TD, weight_VD, ids_TK, labels_T, tuple(temperatures))  # type: ignore[no-untyped-call]
    return KeptLogits(len(weight_VD), ids_TK, kept_TK, label_T, log_rest_TH, tuple(temperatures))
