"""Several prompts decoded side by side by ONNX Runtime: read one after the other, then one token of every row per call.

GroupQueryAttention takes every row's own length from the attention mask, so that rows need no padding between prompt and
answer: row b's tokens lie in the first places of its part of the cache, whatever its neighbours' lengths. A row that has
ended leaves the batch. Every row draws with its own random numbers, as `base.generate` does.

Legend: B rows still going, C context length, V vocabulary.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime

from moe_edge.runtimes.base import Prompt
from moe_edge.runtimes.sampling import RowNoise, Sampling, pick

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Decoder:
    """What of an open session the batch needs.

    `read`: a prompt to its last logits [V]; afterwards `held` gives the caches and states that it left, [1, ...] each.
    """

    session: onnxruntime.InferenceSession
    caches: Mapping[str, str]  # input -> output, written in place; [B, heads, C, width]
    states: Mapping[str, str]  # input -> output, a new tensor per call; [B, ...]
    vocab: int
    read: Callable[[np.ndarray], np.ndarray]
    held: Callable[[], tuple[Arrays, Arrays]]


def generate_side_by_side(
    decoder: Decoder, prompts: Sequence[Prompt], max_new_tokens: int, stop_ids: Collection[int], sampling: Sampling
) -> list[list[int]]:
    """The continuation of every prompt, up to its first stop token; the same tokens as one prompt at a time.

    Raises:
        InputRejected: the logits of one row hold NaN or infinity.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    if max_new_tokens < 1 or not prompts:
        return answers
    noise = [RowNoise(prompt.seed, prompt.row) for prompt in prompts]
    room = max(len(prompt.ids) for prompt in prompts) + max_new_tokens
    batch, logits_BV = _read_all(decoder, prompts, room)
    going = list(range(len(prompts)))
    while True:
        tokens = [pick(logits_V, sampling, noise[row]) for logits_V, row in zip(logits_BV, going, strict=True)]
        for row, token in zip(going, tokens, strict=True):
            if token not in stop_ids:
                answers[row].append(token)
        stay = [at for at, row in enumerate(going) if tokens[at] not in stop_ids and len(answers[row]) < max_new_tokens]
        if not stay:
            return answers
        if len(stay) < len(going):
            batch.keep(stay)
        going, tokens = [going[at] for at in stay], [tokens[at] for at in stay]
        logits_BV = batch.step(tokens)


def _read_all(decoder: Decoder, prompts: Sequence[Prompt], room: int) -> tuple["_Batch", np.ndarray]:
    """Every prompt into its row of one cache with `room` places, and the prompts' last logits [B, V]."""
    last: list[np.ndarray] = []
    caches: Arrays = {}
    states: dict[str, list[np.ndarray]] = {}
    for row, prompt in enumerate(prompts):
        last.append(decoder.read(np.asarray(prompt.ids, dtype=np.int64)))
        row_caches, row_states = decoder.held()
        for name, part in row_caches.items():
            if name not in caches:
                caches[name] = np.zeros((len(prompts), part.shape[1], room, part.shape[3]), part.dtype)
            length = len(prompt.ids)
            caches[name][row, :, :length] = part[0, :, :length]
        for name, part in row_states.items():
            states.setdefault(name, []).append(part)
    lengths_B = np.array([len(prompt.ids) for prompt in prompts])
    joined = {name: np.concatenate(parts) for name, parts in states.items()}
    return _Batch(decoder, caches, joined, lengths_B), np.stack(last)


class _Batch:
    """Rows of different lengths in one cache."""

    def __init__(self, decoder: Decoder, caches: Arrays, states: Arrays, lengths_B: np.ndarray) -> None:
        self._decoder, self._lengths_B = decoder, lengths_B
        self._caches, self._states = _values(caches), _values(states)

    def keep(self, rows: list[int]) -> None:
        """Drop every other row."""
        self._lengths_B = self._lengths_B[rows]
        self._caches = _values({name: value.numpy()[rows] for name, value in self._caches.items()})
        self._states = _values({name: value.numpy()[rows] for name, value in self._states.items()})

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Append one token to every row and return their logits [B, V] float32."""
        self._lengths_B = self._lengths_B + 1
        places = np.arange(self._lengths_B.max())
        mask_BC = (places < self._lengths_B[:, None]).astype(np.int64)
        binding = self._decoder.session.io_binding()
        binding.bind_cpu_input("input_ids", np.array(tokens, dtype=np.int64)[:, None])
        binding.bind_cpu_input("attention_mask", mask_BC)
        for past, present in self._decoder.caches.items():
            binding.bind_ortvalue_input(past, self._caches[past])
            binding.bind_ortvalue_output(present, self._caches[past])
        for past, present in self._decoder.states.items():
            binding.bind_ortvalue_input(past, self._states[past])
            binding.bind_output(present)
        binding.bind_output("logits")
        self._decoder.session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        states = outputs[len(self._decoder.caches) : -1]
        self._states = dict(zip(self._decoder.states, states, strict=True))
        return np.array(outputs[-1].numpy()[:, -1, : self._decoder.vocab], dtype=np.float32)


def _values(arrays: Arrays) -> dict[str, onnxruntime.OrtValue]:
    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(one)) for name, one in arrays.items()}
