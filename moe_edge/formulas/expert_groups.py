"""Which of the teacher's experts a student's expert answers for, and what their group says together.

A student with fewer experts cannot match the teacher one to one. Every student expert gets one teacher expert (the
assignment of largest total similarity), and each teacher expert that is left joins the student expert it is most like.
With equal counts that is plain Hungarian matching.

Shape suffixes: J experts of the student, E experts of the teacher, T tokens, D model.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

NO_OWNER = -1
TINY = 1e-30


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
        output_ETD: what every teacher expert says, before its gate.
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
