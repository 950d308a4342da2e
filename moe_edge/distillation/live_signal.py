"""The teacher's signal from the teacher itself: one forward pass per micro-batch, without gradients.

Worth its memory where text changes (on-policy), where a divergence needs the whole vocabulary, or where the teacher is
small; everything else is cheaper from the cache. Rows of a micro-batch run in one forward: `prepare` takes them
together, `signal` then gives each row's part; a row that was not prepared runs alone.

Shape suffixes: B rows of a micro-batch, S tokens of a row, D model width, V vocabulary.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.distillation.signal import DenseSignal
from moe_edge.families.students import load_student, use_fastest_experts
from moe_edge.families.taps import body, head


class LiveSignal:
    """A teacher in memory.

    Args:
        teacher: a checkpoint folder of a supported family, or a loaded model; it is frozen and put into eval mode.
        device: where it runs.
        dtype: of a folder's weights; None: bfloat16 on an accelerator, float32 on a CPU.
        vocab: true vocabulary; the head's rows beyond it are padding. None: all are real.

    Raises:
        ConfigError, InputRejected: as `load_student`.
    """

    def __init__(
        self,
        teacher: Path | str | PreTrainedModel,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        vocab: int | None = None,
    ) -> None:
        if isinstance(teacher, Path | str):
            on_cpu = torch.device(device).type == "cpu"
            teacher = load_student(Path(teacher), dtype or (torch.float32 if on_cpu else torch.bfloat16))
            if on_cpu:
                use_fastest_experts(teacher)
        self.model = teacher.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
        self.vocab = vocab
        self._prepared: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def prepare(self, ids_BS: Tensor) -> None:
        """Read the rows of a micro-batch at once; their hidden states are kept until the next call."""
        device = next(self.model.parameters()).device
        hidden_BSD = body(self.model)(input_ids=ids_BS.to(device), use_cache=False).last_hidden_state
        self._prepared = dict(zip(map(_key, ids_BS), hidden_BSD, strict=True))

    @torch.no_grad()
    def signal(self, ids_S: Tensor, temperature: float = 1.0) -> DenseSignal:
        """The whole distribution on one row, on the device of its ids; it holds for every temperature."""
        if _key(ids_S) not in self._prepared:
            self.prepare(ids_S[None])
        return DenseSignal(head(self.model)(self._prepared[_key(ids_S)])[:, : self.vocab].to(ids_S.device))

    def close(self) -> None:
        """Forget the last micro-batch."""
        self._prepared = {}


def _key(ids_S: Tensor) -> bytes:
    return ids_S.cpu().numpy().tobytes()
