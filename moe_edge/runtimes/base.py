"""The one interface behind which transformers, llama.cpp and ONNX Runtime look the same.

What: `Runtime`, the protocol of an opened artifact, and `generate`, decoding on top of it: greedy, or sampled with a seed.
Parity checks, the quality judge and the speed harness speak only to this. Why one shape: a number that compares two
runtimes must come from the same calls. Legend: S sequence, V vocabulary in the natural Hugging Face order.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import numpy as np

from moe_edge.contracts.errors import ConfigError
from moe_edge.runtimes.sampling import GREEDY, RowNoise, Sampling, pick
from moe_edge.storage.files import Closing


@dataclass(frozen=True)
class Prompt:
    """One prompt to be continued; `row` names it for the random numbers (`sampling.RowNoise`)."""

    ids: Sequence[int]
    row: str = ""
    seed: int = 0


class LogitModel(Protocol):
    """A model that gives the logits of whole rows."""

    vocab: int

    def logits(self, ids_S: np.ndarray) -> np.ndarray:
        """Logits [S, V] float32 of every position."""
        ...


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

    def generate_batch(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop_ids: Collection[int], sampling: Sampling
    ) -> list[list[int]]:
        """The continuation of every prompt, as `generate` gives it."""
        ...

    def close(self) -> None:
        """Free the model and the context; closing twice is harmless."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class ClosingRuntime(Closing):
    """What the adapters inherit: the context manager, and batches that are answered one prompt after another."""

    def generate_batch(
        self: Runtime, prompts: Sequence[Prompt], max_new_tokens: int, stop_ids: Collection[int], sampling: Sampling
    ) -> list[list[int]]:
        """The continuation of every prompt; adapters that decode rows side by side override it."""
        return [generate(self, p.ids, max_new_tokens, stop_ids, sampling, RowNoise(p.seed, p.row)) for p in prompts]

    def close(self) -> None:
        """Overridden by the adapter that owns something."""


def checked_tokens(
    ids_S: Sequence[int] | np.ndarray, used: int, context_length: int, vocab: int, where: Path | str = ""
) -> np.ndarray:
    """Token ids as int64 [S], once it is known that a runtime can take them: native code would not ask.

    Args:
        used: tokens that the context holds already.
        where: the artifact, for the message.

    Raises:
        ConfigError: there are none, they do not fit into the context, or one is outside the vocabulary.
    """
    given_S = np.ascontiguousarray(ids_S, dtype=np.int64)
    if not given_S.size or used + given_S.size > context_length:
        more = f"{given_S.size} more" if given_S.size else "no tokens to read"
        raise ConfigError(
            "the tokens do not fit into the context",
            where=str(where),
            why=f"{used} tokens in the context and {more}, limit {context_length}",
            next_command="give at least one token, and shorten the text or set target.context_length",
        )
    outside = given_S[(given_S < 0) | (given_S >= vocab)]
    if outside.size:
        raise ConfigError(f"token id {outside[0]} is outside the vocabulary of {vocab}", where=str(where))
    return given_S


def generate(
    runtime: Runtime,
    ids_S: Sequence[int] | np.ndarray,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    sampling: Sampling = GREEDY,
    noise: RowNoise | None = None,
) -> list[int]:
    """Continuation of a prompt, without the prompt; a stop token ends it and is not returned.

    Args:
        runtime: an open runtime.
        ids_S: the prompt.
        max_new_tokens: fewer tokens than this mean that a stop token came.
        stop_ids: tokens that end an answer.
        sampling: greedy by default.
        noise: the random numbers of a sampled answer; the same ones give the same answer.

    Raises:
        InputRejected: the logits hold NaN or infinity.
    """
    noise = noise or RowNoise(0, "")
    generated: list[int] = []
    if max_new_tokens < 1:
        return generated
    logits_V = runtime.prefill(np.asarray(ids_S, dtype=np.int64))
    while len(generated) < max_new_tokens:
        token = pick(logits_V, sampling, noise)
        if token in stop_ids:
            break
        generated.append(token)
        if len(generated) < max_new_tokens:
            logits_V = runtime.step(token)
    return generated
