"""The one interface behind which transformers, llama.cpp and ONNX Runtime look the same.

What: `Runtime`, the protocol of an opened artifact, and `generate`, greedy decoding on top of it. Parity checks, the
quality judge and the speed harness speak only to this. Why one shape: a number that compares two runtimes must come
from the same calls. Legend: S sequence, V vocabulary in the natural Hugging Face order.
"""

from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import numpy as np


@runtime_checkable
class Runtime(Protocol):
    """An opened artifact that turns token ids into logits; a context manager that frees everything on exit."""

    name: str
    vocab: int

    def logits(self, ids_S: np.ndarray) -> np.ndarray:
        """Logits [S, V] float32 of every position, from an empty context."""
        ...

    def prefill(self, ids_S: np.ndarray) -> np.ndarray:
        """Empty the context, read the prompt, return the last position's logits [V] float32."""
        ...

    def step(self, token: int) -> np.ndarray:
        """Append one token to the context and return its logits [V] float32."""
        ...

    def close(self) -> None:
        """Free the model and the context; closing twice is harmless."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ClosingRuntime:
    """The context-manager half of a runtime, for the adapters to inherit."""

    def close(self) -> None:
        """Overridden by the adapter that owns something."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def generate(
    runtime: Runtime, ids_S: Sequence[int] | np.ndarray, max_new_tokens: int, stop_ids: Collection[int] = ()
) -> list[int]:
    """Greedy continuation of a prompt, without the prompt; a stop token ends it and is not returned."""
    generated: list[int] = []
    logits_V = runtime.prefill(np.asarray(ids_S, dtype=np.int64))
    while len(generated) < max_new_tokens:
        token = int(np.argmax(logits_V))
        if token in stop_ids:
            break
        generated.append(token)
        if len(generated) < max_new_tokens:
            logits_V = runtime.step(token)
    return generated
