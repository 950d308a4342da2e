"""ONNX Runtime behind the runtime interface: a plain InferenceSession on the CPU, no onnxruntime-genai needed.

The key-value cache is one buffer per layer and side, as long as the context. Each call binds it as past and as present,
so that GroupQueryAttention appends in place and a decoded token copies nothing but its logits. The small state of a
convolution layer is a new tensor after every call.

Legend: S sequence, C context length, V vocabulary.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.runtimes.base import ClosingRuntime, Prompt, checked_tokens
from moe_edge.runtimes.onnx_header import MAX_DIMENSION, OnnxHeader, inspect_onnx
from moe_edge.runtimes.ort_batch import Decoder, generate_side_by_side
from moe_edge.runtimes.sampling import Sampling

PROVIDERS = ["CPUExecutionProvider"]
CHUNK_TOKENS = 512  # a longer prompt is read in pieces, so that its logits stay small
PAST, STATE = "past_key_values.", re.compile(r"past\.\d+\.conv")
ERRORS_ONLY = 3
_REJECTED = (
    onnxruntime.capi.onnxruntime_pybind11_state.Fail,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    onnxruntime.capi.onnxruntime_pybind11_state.NoSuchFile,
    onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented,
    onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException,
)


class OrtRuntime(ClosingRuntime):
    """An ONNX folder (model.onnx, genai_config.json) with a key-value cache for `prefill` and `step`.

    Args:
        path: the folder.
        threads: threads inside an operator (0 = ONNX Runtime's choice).
        context_length: tokens that fit into one context; at most what the model was built for.

    Raises:
        InputRejected: the folder is corrupt, unsafe, or not a decoder with a key-value cache.
    """

    name = "ort"

    def __init__(self, path: Path, threads: int, context_length: int) -> None:
        self.path = Path(path)
        header = inspect_onnx(self.path)
        self.vocab = header.vocab
        self.context_length = min(context_length, header.context_length)
        self._session: onnxruntime.InferenceSession | None = _open(header, threads)
        self._shape = (1, header.kv_heads, self.context_length, header.head_dim)
        self._past, states = _cache_names(self._session, header)
        self._states = {name: name.replace("past.", "present.", 1) for name in states}
        self._at_rest = {name: np.zeros(shape, np.float32) for name, shape in states.items()}
        self._cache: dict[str, Any] = {}
        self._state: dict[str, Any] = {}
        self._mask_1C = np.ones((1, self.context_length), np.int64)
        self._used: int | None = None

    def logits(self, ids_S: np.ndarray) -> np.ndarray:
        """Logits [S, V] float32 of every position, from an empty context. Raises ConfigError when S is too long."""
        ids_1S = self._checked(ids_S, 0)
        empty = np.zeros((1, self._shape[1], 0, self._shape[3]), np.float32)
        feeds = {"input_ids": ids_1S, "attention_mask": self._mask_1C[:, : ids_1S.shape[1]]}
        feeds |= dict.fromkeys(self._past, empty) | self._at_rest
        logits: np.ndarray = self._open_session().run(["logits"], feeds)[0][0, :, : self.vocab]
        return np.ascontiguousarray(logits, dtype=np.float32)

    def prefill(self, ids_S: np.ndarray) -> np.ndarray:
        """Empty the context, read the prompt, return the last position's logits [V] float32."""
        self._used = None
        ids_1S = self._checked(ids_S, 0)
        if not self._cache:
            self._cache = {
                name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(self._shape, np.float32)) for name in self._past
            }
        self._state = {name: onnxruntime.OrtValue.ortvalue_from_numpy(zeros) for name, zeros in self._at_rest.items()}
        self._used = 0
        for start in range(0, ids_1S.shape[1], CHUNK_TOKENS):
            last_V = self._forward(ids_1S[:, start : start + CHUNK_TOKENS])
        return last_V

    def step(self, token: int) -> np.ndarray:
        """Append one token and return its logits [V] float32. Raises ConfigError before a prefill or when full."""
        if self._used is None:
            raise ConfigError("step needs a prefill first")
        return self._forward(self._checked(np.array([token]), self._used))

    def generate_batch(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop_ids: Collection[int], sampling: Sampling
    ) -> list[list[int]]:
        """The continuations of all prompts, decoded side by side; another `step` needs a `prefill` first.

        Raises:
            ConfigError: a prompt is empty, does not fit into the context with its answer, or holds an unknown token.
        """
        for prompt in prompts:
            checked_tokens(prompt.ids, max_new_tokens, self.context_length, self.vocab, self.path)
        decoder = Decoder(self._open_session(), self._past, self._states, self.vocab, self.prefill, self._held)
        try:
            return generate_side_by_side(decoder, prompts, max_new_tokens, stop_ids, sampling)
        finally:
            self._used = None

    def _held(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Copies of the caches and of the states of the context read last."""
        caches = {name: value.numpy() for name, value in self._cache.items()}
        return caches, {name: value.numpy() for name, value in self._state.items()}

    def close(self) -> None:
        """Free the session and the cache; closing twice is harmless."""
        self._session, self._cache, self._state, self._used = None, {}, {}, None

    def _forward(self, ids_1S: np.ndarray) -> np.ndarray:
        """Run the tokens after those in the cache and return the last one's logits, a copy."""
        session, used = self._open_session(), (self._used or 0) + ids_1S.shape[1]
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids_1S))
        binding.bind_cpu_input("attention_mask", self._mask_1C[:, :used])
        for past, present in self._past.items():
            binding.bind_ortvalue_input(past, self._cache[past])
            binding.bind_ortvalue_output(present, self._cache[past])
        for past, present in self._states.items():
            binding.bind_ortvalue_input(past, self._state[past])
            binding.bind_output(present)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        self._used, outputs = used, binding.get_outputs()
        self._state = dict(zip(self._states, outputs[len(self._past) : -1], strict=True))
        return np.array(outputs[-1].numpy()[0, -1, : self.vocab], dtype=np.float32)

    def _open_session(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise ConfigError("the runtime is closed")
        return self._session

    def _checked(self, ids_S: np.ndarray, used: int) -> np.ndarray:
        """Ids as [1, S] int64; raises as `checked_tokens`."""
        return checked_tokens(ids_S, used, self.context_length, self.vocab, self.path).reshape(1, -1)


def _open(header: OnnxHeader, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(header.graph), options, providers=PROVIDERS)
    except _REJECTED as error:
        reason = str(error).splitlines()[0]
        raise InputRejected("ONNX Runtime cannot load this model", where=str(header.graph), why=reason) from error


def _cache_names(
    session: onnxruntime.InferenceSession, header: OnnxHeader
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Cache input -> cache output, in the session's order; and the inputs with a convolution's state -> its shape.

    Raises:
        InputRejected: the graph's inputs and outputs are not a decoder's.
    """
    inputs = {value.name: value.shape for value in session.get_inputs()}
    outputs = {value.name for value in session.get_outputs()}
    caches = {name: name.replace("past_key_values.", "present.", 1) for name in inputs if name.startswith(PAST)}
    states = {name: (1, *shape[1:]) for name, shape in inputs.items() if STATE.fullmatch(name)}
    wanted = {"logits", *caches.values(), *(name.replace("past.", "present.", 1) for name in states)}
    complete = {"input_ids", "attention_mask"} | caches.keys() | states.keys() == inputs.keys() and wanted == outputs
    sized = all(isinstance(size, int) and 0 < size <= MAX_DIMENSION for shape in states.values() for size in shape)
    if not complete or not sized or len(caches) + 2 * len(states) != 2 * header.layers:
        why = f"inputs {sorted(inputs)[:4]}..., outputs {sorted(outputs)[:4]}..."
        raise InputRejected("the graph is not a decoder with a key-value cache", where=str(header.graph), why=why)
    return caches, states
