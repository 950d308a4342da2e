"""What a plan's student loses before any training: the plan is applied to a copy of the teacher and judged against it.

Masking predicts what dropping costs, but cannot see what the refit of the down projections wins back, and that differs
between shapes: on the 134.8 M benchmark model it turned .494 nats of dropped experts into .116, and .342 nats of silent
neurons into .286. So where a second copy of the teacher fits in memory, shapes are compared by this number.

Shape suffixes: N rows, S tokens of a row, V vocabulary.
"""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.compression.layers import Material
from moe_edge.compression.masking import MaskedKl, batches_of, logits_of, row_kl, summarise
from moe_edge.compression.surgery import apply_plan
from moe_edge.contracts.plan import Plan


@torch.no_grad()
def refitted_kl(model: PreTrainedModel, plan: Plan, material: Material, ids_NS: Tensor) -> MaskedKl:
    """KL(teacher || the student that `compress` would write), nats per token; the teacher stays as it is.

    Args:
        material: what the plan is fitted on.
        ids_NS: rows to judge on; those that the plan is fitted on would flatter it.

    Raises:
        As `surgery.apply_plan`.
    """
    student = apply_plan(copy.deepcopy(model), plan, material).model
    batches = batches_of(model, ids_NS)
    kl_N = torch.cat([row_kl(logits_of(model, batch_NS), logits_of(student, batch_NS)) for batch_NS in batches])
    return summarise(kl_N, ids_NS.numel())
