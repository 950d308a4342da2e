"""Distances between a student's features and the teacher's on the same tokens, beside CKA; 0 where they are equal.

CKA pulls geometry together and is blind to rotation; a pruned student, whose head and frozen layers expect the teacher's
basis, may also be held to the numbers themselves. Both distances here are free of the features' common scale, so that
a loss weight means the same in every layer of a residual stream that grows with depth.

Shape suffixes: T tokens, D width of both.
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
