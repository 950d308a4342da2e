"""Which teacher layer a student layer is compared with, where the two models differ in depth.

Shape suffixes: J layers of the student, L layers of the teacher.
"""

import torch
from torch import Tensor


def proportional_map(student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher layer at the same share of the depth: round((j + 1) L / J) - 1, halves upwards; at least 0."""
    halves = ((layer + 1) * 2 * teacher_layers + student_layers for layer in range(student_layers))
    return [max(0, half // (2 * student_layers) - 1) for half in halves]


def best_monotone_map(similarity_JL: Tensor) -> list[int]:
    """The map g that never steps back (g(j) <= g(j + 1)) with the largest sum of similarity[j, g(j)].

    Dynamic programme over prefixes, O(J L). NaN (no evidence) counts as 0; among equals the shallowest layers win.

    Returns:
        The teacher layer of every student layer.
    """
    gain_JL = similarity_JL.double().nan_to_num(nan=0.0)
    total_L = torch.zeros(gain_JL.shape[1], dtype=torch.float64, device=gain_JL.device)
    best_layer_up_to = []
    for gain_L in gain_JL:
        # the best total of the layers so far, the last of them mapped to at most l, and where it is mapped to
        total_L, choice_L = _running_max(total_L + gain_L)
        best_layer_up_to.append(choice_L.tolist())
    path, limit = [], gain_JL.shape[1] - 1
    for choices in reversed(best_layer_up_to):
        limit = choices[limit]
        path.append(limit)
    return path[::-1]


def _running_max(values_L: Tensor) -> tuple[Tensor, Tensor]:
    """(max of values[: l + 1], the first index that reaches it) for every l."""
    best_L = torch.cummax(values_L, dim=0).values
    first_L = torch.searchsorted(best_L, best_L, right=False)  # best_L ascends: the first place of every maximum
    return best_L, first_L
