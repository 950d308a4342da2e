"""Distances between a student's features and the teacher's on the same tokens; 0 where they are equal.

`cka_distance` pulls geometry together and is blind to rotation and projection. A pruned student, whose head and frozen layers
expect the teacher's basis, may also be held to the numbers themselves: `relative_mse` and `cosine_distance`. All are free of
the features' common scale, so that a loss weight means the same in every layer of a residual stream that grows with depth.

`procrustes_distance` is the one after the best rotation. Unlike CKA it is a metric of the shapes themselves, and a distance
of 0 fixes them up to one rotation (arXiv:2509.25253 finds it the better loss where CKA leaves the geometry free). Like CKA
it needs no projection, and the widths may differ: the narrower side counts as padded with zeros.
min_R ||X R - Y||_F^2 = ||X||^2 + ||Y||^2 - 2 ||X'Y||_*, reached by R = U V' with X'Y = U S V' (Schoenemann 1966). The rotation
is held fixed in the backward pass: at the optimum its own derivative vanishes, so the gradient is that of the nuclear
norm, and no singular value is ever divided by the gap to another. It has no debiased form: with fewer tokens than
dimensions, a rotation brings even unrelated features nearer.

Shape suffixes: T tokens, D and J widths of the two sides (D where they must be the same), R rank.
"""

import torch
from torch import Tensor

from moe_edge.formulas.cka_loss import cka_pair

EPS = 1e-12


def cka_distance(student_TD: Tensor, teacher_TJ: Tensor) -> Tensor:
    """1 - debiased linear CKA; the widths may differ. Raises ValueError below four tokens."""
    return 1 - cka_pair(student_TD, teacher_TJ)


def relative_mse(student_TD: Tensor, teacher_TD: Tensor) -> Tensor:
    """||student - teacher||^2 / ||teacher||^2 over all tokens, a scalar: the share of the teacher's energy that is missed."""
    student_TD, teacher_TD = _same_width(student_TD, teacher_TD)
    value: Tensor = (student_TD - teacher_TD).square().sum() / teacher_TD.square().sum().clamp_min(EPS)
    return value


def cosine_distance(student_TD: Tensor, teacher_TD: Tensor) -> Tensor:
    """Mean over tokens of 1 - cos(student, teacher), a scalar in [0, 2]; a token without length counts 1."""
    student_TD, teacher_TD = _same_width(student_TD, teacher_TD)
    energy_T = student_TD.square().sum(-1) * teacher_TD.square().sum(-1)
    value: Tensor = (1 - (student_TD * teacher_TD).sum(-1) / torch.sqrt(energy_T + EPS)).mean()
    return value


def _same_width(student_TD: Tensor, teacher_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 at least."""
    if student_TD.shape != teacher_TD.shape:
        raise ValueError(f"features of the same tokens and width are needed: {student_TD.shape} and {teacher_TD.shape}")
    dtype = torch.promote_types(student_TD.dtype, torch.float32)
    return student_TD.to(dtype), teacher_TD.to(dtype)


def procrustes_distance(x_TD: Tensor, y_TJ: Tensor) -> Tensor:
    """min over rotations of ||X R - Y||_F^2 / 2 with both sides centred and of length 1: 1 - ||X'Y||_*, in [0, 1].

    A side without variance is at distance 1, with a gradient of 0.

    Raises:
        ValueError: not the same tokens.
    """
    if x_TD.shape[0] != y_TJ.shape[0]:
        raise ValueError(f"Procrustes needs the same tokens: {x_TD.shape} and {y_TJ.shape}")
    x_TD, y_TJ = _shape(x_TD), _shape(y_TJ)
    left_DR, right_JR = _best_rotation(x_TD, y_TJ)
    value: Tensor = 1 - ((x_TD @ left_DR) * (y_TJ @ right_JR)).sum()
    return value


def _shape(features_TD: Tensor) -> Tensor:
    """Centred over tokens, Frobenius norm 1, float32 at least."""
    features_TD = features_TD.to(torch.promote_types(features_TD.dtype, torch.float32))
    centred_TD = features_TD - features_TD.mean(0)
    centred_TD = torch.where(_is_flat(features_TD, centred_TD), 0.0, centred_TD)
    unit_TD: Tensor = centred_TD / torch.sqrt(centred_TD.square().sum() + EPS)
    return unit_TD


def _is_flat(features_TD: Tensor, centred_TD: Tensor) -> Tensor:
    """Is what is left behind the mean only rounding?"""
    flat: Tensor = centred_TD.detach().norm() <= 1e-6 * features_TD.detach().norm()
    return flat


@torch.no_grad()
def _best_rotation(x_TD: Tensor, y_TJ: Tensor) -> tuple[Tensor, Tensor]:
    """(U [D, R], V [J, R]) of X'Y, whose product U V' is the rotation; directions without singular value are left out.

    The decomposition runs in the space of the tokens' rows, so that it costs min(T, D)^3 and not D^3.
    """
    basis_x, basis_y = torch.linalg.qr(x_TD.mT).Q, torch.linalg.qr(y_TJ.mT).Q
    u, singular_R, vh = torch.linalg.svd((x_TD @ basis_x).mT @ (y_TJ @ basis_y), full_matrices=False)
    tolerance = torch.finfo(singular_R.dtype).eps * len(singular_R) * singular_R[:1]
    kept_R = singular_R > tolerance
    return basis_x @ u[:, kept_R], basis_y @ vh.mT[:, kept_R]
