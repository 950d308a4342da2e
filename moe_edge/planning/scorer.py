"""The teacher as the planner needs it: masked KL of named choices, with the whole model in memory or layer by layer.

The profile's rule decides which (profile.mode). A teacher that is streamed can be judged, but not searched: every swap
would read it once more.

Shape suffixes: N rows, S tokens of a row.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.models.loading import load_model
from moe_edge.models.pruning import NeuronMask
from moe_edge.models.streaming import StreamedModel
from moe_edge.planning.curve import Score
from moe_edge.planning.masking import MaskedKl, masked_kl
from moe_edge.planning.streamed_kl import streamed_masked_kl
from moe_edge.process.placement import fits_in_memory

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Teacher:
    """Something whose experts can be masked."""

    masked: Callable[..., Mapping[str, MaskedKl]]  # (choices, ids_NS, top_k=..., neurons=...), see masking.masked_kl
    model: PreTrainedModel | None  # None where it does not fit in memory

    def at(self, top_k: int | None, neurons: NeuronMask | None) -> Score:
        """Masked KL of named choices on rows, with the student's top-k and neurons; None: the teacher's."""
        return partial(self.masked, top_k=top_k, neurons=neurons)


@contextmanager
def open_teacher(context: StageContext, headers: CheckpointHeaders) -> Iterator[Teacher]:
    """The teacher while the context is open.

    Raises:
        InputRejected: as `models.loading.load_model`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    auto = torch.bfloat16 if device == "cuda" else torch.float32
    dtype, mode = _DTYPES.get(context.config.teacher.dtype, auto), context.config.profile.mode
    if mode == "whole" or (mode == "auto" and fits_in_memory(headers, dtype, device)):
        model = load_model(context.teacher, dtype=dtype)
        model.to(device)  # type: ignore[arg-type]  # transformers hides nn.Module.to
        yield Teacher(partial(masked_kl, model), model)
        return
    with (
        TemporaryDirectory(prefix="streams-", dir=context.out, ignore_cleanup_errors=True) as scratch,
        StreamedModel(context.teacher, dtype, device, compact=True) as streamed,
    ):
        yield Teacher(partial(streamed_masked_kl, streamed, scratch=Path(scratch)), None)
