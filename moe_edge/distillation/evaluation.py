"""What distillation gained: the held-out KL to the teacher from its cached signal.

Shape suffixes: N rows, S tokens of a row, D model.
"""

import numpy as np
import torch
from torch import nn

from moe_edge.distillation.losses import TokenLosses
from moe_edge.distillation.signal import SignalSource
from moe_edge.models.taps import body, head
from moe_edge.process.progress import track


@torch.no_grad()
def held_out_kl(student: nn.Module, ids_NS: np.ndarray, signal: SignalSource, vocab: int) -> float:
    """Mean KL(teacher || student) at T = 1 in nats per token over all positions of the rows.

    Of the cached teacher: its top-k and one tail bucket, a lower bound of the full KL.
    """
    total, device, losses = 0.0, next(student.parameters()).device, TokenLosses({"kl": 1.0}, temperature=1.0)
    for ids_S in track(ids_NS, "distill: held-out KL"):
        ids_S = torch.from_numpy(ids_S).long().to(device)
        hidden_SD = body(student)(input_ids=ids_S[None], use_cache=False).last_hidden_state[0]
        loss, _ = losses(hidden_SD, head(student).weight[:vocab], None, [signal.signal(ids_S, 1.0)])
        total += float(loss)
    return total / ids_NS.size
