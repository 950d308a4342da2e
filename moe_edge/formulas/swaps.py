"""Exchanging an expert, on paper: what other sets of kept experts would do to the KL, from inner products alone.

A search tries thousands of sets and can run the model for a few. In between stand two predictions for the sets of one
layer, both made of numbers per token and expert that one forward and a few backward passes leave behind:

- *pull*: the first- and second-order change of the KL. With y the layer's routed output, g = dKL/dy, and s the gradient of
  the log-probability of a label drawn from the student itself, a change D of y costs g.D + (s.D)^2 / 2 at a token as long
  as D is small; the second term is the Gauss-Newton curvature, whose expectation over labels is exact at the head
  (Martens 2020, arXiv:1412.1193, section 9). A swap is not small: the layers above normalise, and a KL does not grow as a
  square. So the curvature counts by CURVATURE_SHARE, and the sum is divided by one plus the curvature, which bounds it.
- *likeness*: the cosine between the layer's residual stream and the teacher's. It sees no logits, but it stays sane where
  a layer's outputs are so large that no expansion holds (the first ones).

Shape suffixes: C sets, T tokens, E experts, R gradients (the KL's first, then one per drawn label).
"""

from typing import NamedTuple

import torch
from torch import Tensor

CURVATURE_SHARE = 0.75  # see above; measured: tests/benchmarks/bench_swaps.py
LEAST_ROWS = 4  # from which a standard error over rows means something


class LayerProducts(NamedTuple):
    """Inner products of every expert's output f_e(x_t) with what matters in one layer."""

    weight_TE: Tensor  # with which the experts are mixed now; 0 where not routed
    pull_RTE: Tensor  # with the gradients
    own_TE: Tensor  # with the student's residual stream h behind the layer
    teacher_TE: Tensor  # with the teacher's, h*
    gram_TEE: Tensor  # with each other
    norms_T3: Tensor  # h.h, h.h*, h*.h*


class Predicted(NamedTuple):
    """What a set would change, per set [C]."""

    gain: Tensor  # nats per token that the KL falls, by the pull
    gain_se: Tensor  # its standard error
    likeness: Tensor  # rise of the mean cosine to the teacher
    likeness_se: Tensor


def predict(products: LayerProducts, weight_CTE: Tensor, rows: int = 1) -> Predicted:
    """Both predictions for sets that would mix the experts by `weight_CTE` instead.

    Args:
        rows: the tokens are those of so many rows of equal length, in order.
    """
    change_CTE = weight_CTE - products.weight_TE
    moved_CRT = torch.einsum("cte,rte->crt", change_CTE, products.pull_RTE)
    cost_CT = damped(moved_CRT[:, 0], moved_CRT[:, 1:].square().mean(dim=1) / 2)
    rise_CT = _cosine(products, change_CTE) - _cosine(products, torch.zeros_like(change_CTE[:1]))
    return Predicted(
        -cost_CT.mean(dim=1), standard_error(cost_CT, rows), rise_CT.mean(dim=1), standard_error(rise_CT, rows)
    )


def standard_error(values_XT: Tensor, rows: int) -> Tensor:
    """Of the mean over tokens, [X]. Tokens of a row are not independent, so rows are the sample where there are enough."""
    means_XN = values_XT.reshape(*values_XT.shape[:-1], rows, -1).mean(dim=-1) if rows >= LEAST_ROWS else values_XT
    error_X: Tensor = means_XN.std(dim=-1) / means_XN.shape[-1] ** 0.5
    return error_X


def damped(slope: Tensor, curvature: Tensor) -> Tensor:
    """(slope + a share of the curvature) / (1 + curvature): the plain sum where small, bounded where large."""
    return (slope + CURVATURE_SHARE * curvature) / (1 + curvature)


def _cosine(products: LayerProducts, change_CTE: Tensor) -> Tensor:
    """cos(h + sum_e change_e f_e, h*), [C, T]; 0 where one of them is zero."""
    own_T, both_T, teacher_T = products.norms_T3.unbind(dim=-1)
    mixed_CTE = torch.einsum("cte,tef->ctf", change_CTE, products.gram_TEE)
    length_sq_CT = own_T + (change_CTE * (2 * products.own_TE + mixed_CTE)).sum(dim=-1)
    dot_CT = both_T + (change_CTE * products.teacher_TE).sum(dim=-1)
    scale_CT = (length_sq_CT.clamp(min=0) * teacher_T).sqrt()
    return (dot_CT / scale_CT).where(scale_CT > 0, 0.0)
