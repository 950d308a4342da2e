"""What of the teacher a part of the student is compared with, where the two differ in depth or in the number of experts.

Layers: `proportional_map` by their share of the depth, `best_monotone_map` by similarity without ever stepping back.
Experts: a student with fewer cannot match the teacher one to one. Every student expert gets one teacher expert (the
assignment of largest total similarity), and each teacher expert that is left joins the student expert it is most like; with
equal counts that is plain Hungarian matching. Such a group's answer is the gate-weighted mean of its outputs.

Shape suffixes: J layers or experts of the student, L layers and E experts of the teacher, T tokens, D model.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

NO_OWNER = -1
TINY = 1e-30


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


def expert_owners(similarity_JE: Tensor) -> Tensor:
    """The student expert that every teacher expert belongs to, [E] int64; -1 without evidence (NaN).

    Args:
        similarity_JE: larger is more alike, for example debiased CKA on the same tokens.
    """
    known_JE = ~similarity_JE.isnan()
    filled_JE = similarity_JE.double().where(known_JE, -2.0)  # below any CKA
    owner_E = filled_JE.argmax(dim=0)
    students, teachers = linear_sum_assignment(filled_JE.cpu().numpy(), maximize=True)
    owner_E[torch.from_numpy(teachers).to(owner_E.device)] = torch.from_numpy(students).to(owner_E.device)
    evidence_E = known_JE.gather(0, owner_E.unsqueeze(0)).squeeze(0)
    return owner_E.where(evidence_E, NO_OWNER)


def group_usage(usage_E: Tensor, owner_E: Tensor, students: int) -> Tensor:
    """The share of routed slots that goes to each student expert's group, [J] float64; sums to 1, or 0 without any.

    Args:
        usage_E: how often each teacher expert is chosen, in any unit.
    """
    owned_E = owner_E >= 0
    total_J = torch.zeros(students, dtype=torch.float64, device=usage_E.device)
    total_J = total_J.index_add(0, owner_E[owned_E], usage_E[owned_E].double())
    return total_J / total_J.sum().clamp_min(TINY)


def group_outputs(output_ETD: Tensor, score_TE: Tensor, owner_E: Tensor, students: int) -> Tensor:
    """The gate-weighted mean of each group's outputs, [J, T, D]: sum_i a_i E_i(x), with the a of a group summing to 1.

    Args:
        output_ETD: every teacher expert's output, before its gate.
        score_TE: the router's scores, not negative; of a group only their ratios count.

    A group without experts gives 0.
    """
    owned_E = owner_E >= 0
    owner_O, gate_OT = owner_E[owned_E], score_TE.T[owned_E].to(output_ETD.dtype)
    tokens, width = output_ETD.shape[1:]
    sum_JTD = output_ETD.new_zeros(students, tokens, width)
    sum_JTD = sum_JTD.index_add(0, owner_O, output_ETD[owned_E] * gate_OT.unsqueeze(-1))
    gate_JT = output_ETD.new_zeros(students, tokens).index_add(0, owner_O, gate_OT)
    return sum_JTD / gate_JT.clamp_min(TINY).unsqueeze(-1)
