"""The teacher in memory, asked at most once per micro-batch for everything that losses want of it.

Its logits are never held whole: the head's input and the head are handed on, and each chunk of logits is made where it
is judged. Where no loss wants logits, the layers above the deepest one that is wanted are dropped before it ever runs.

Shape suffixes: B rows, S tokens of a row, T tokens, D model, V vocabulary.
"""

import gc
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_edge.distillation.terms import Heard, Needs
from moe_edge.families.listening import listening
from moe_edge.families.loading import load_model
from moe_edge.families.taps import body


class LiveTeacher:
    """A frozen teacher that answers for micro-batches.

    Args:
        model: the teacher; its parameters are frozen here.
        needs: what losses want beside the logits.
        logits: does anything want its logits?
        routing: a context manager factory (model, draw) -> context, under which it runs: knowledge augmentation, all
            experts; None: its own routing.
    """

    def __init__(self, model: nn.Module, needs: Needs, logits: bool, routing: Any = None) -> None:
        self.model = model.requires_grad_(False).eval()
        self.needs, self._logits, self._routing = needs, logits, routing
        if not logits and needs:
            del body(model).layers[max(needs.layers | needs.routers) + 1 :]
            gc.collect()
        self._last: tuple[Tensor, int, Heard] | None = None

    @classmethod
    def from_folder(cls, path: Path, device: torch.device, dtype: torch.dtype, *args: Any, **options: Any) -> "LiveTeacher":
        """Load the teacher of a folder; raises as `load_model`."""
        teacher = cls(load_model(path, dtype=dtype), *args, **options)
        teacher.model.to(device)
        return teacher

    @torch.no_grad()
    def hear(self, ids_BS: Tensor, mask_BS: Tensor | None = None, draw: int = 0) -> Heard:
        """Everything wanted of one micro-batch; asked again for the same one, it answers from memory.

        Args:
            mask_BS: 1 on real tokens, 0 on padding at the end; None: no padding.
            draw: which sample of a random routing.
        """
        if self._last is not None and self._last[0] is ids_BS and self._last[1] == draw:
            return self._last[2]
        with ExitStack() as stack:
            stack.enter_context(self._routing(self.model, draw) if self._routing else nullcontext())
            sounds = stack.enter_context(listening(self.model, self.needs.layers, self.needs.routers))
            output = body(self.model)(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False)
        hidden_BSD = output.last_hidden_state if self._logits else None
        heard = Heard(hidden_BSD, sounds.layers, sounds.router_logits, sounds.expert_inputs)
        self._last = (ids_BS, draw, heard)
        return heard
