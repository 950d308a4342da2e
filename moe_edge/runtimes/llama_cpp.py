"""llama.cpp behind the runtime interface, on its low-level API.

Why not `llama_cpp.Llama`: with `logits_all` it allocates context x vocabulary floats and hides whether a position was
computed; here every row's logits are copied out of the batch that computed them, and closing frees everything.

Its log goes to Python's logging at debug level and is remembered, so that an error can quote it: libllama writes hundreds
of lines to stderr and reports failures only there; a user must see neither the noise nor a bare "failed to load".

Legend: S sequence, V vocabulary.
"""

import ctypes
import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llama_cpp import llama_cpp as lib

from moe_edge.contracts.errors import ConfigError, InputRejected, ResourceProblem, says_exhausted
from moe_edge.runtimes.base import ClosingRuntime, checked_tokens
from moe_edge.runtimes.gguf_header import check_gguf_header, parts_of

LOGITS_BATCH_TOKENS = 128  # rows of V floats held by llama.cpp at once
PREFILL_BATCH_TOKENS = 512
_MODE_NONE, _MODE_MMAP = 0, 1  # llama_load_mode
_FLASH_ATTENTION_OFF, _FLASH_ATTENTION_ON = 0, 1
_F32 = 0  # ggml_type
KV_TYPES = {"f16": 1, "q8_0": 8}  # name -> ggml_type
_ERROR, _CONTINUED = 4, 5  # ggml_log_level

log = logging.getLogger(__name__)
_recent_errors: deque[str] = deque(maxlen=40)
_last_level = 0


class LlamaCppRuntime(ClosingRuntime):
    """One GGUF file opened in libllama.

    Args:
        path: the GGUF file.
        threads: threads for prompts and for decoding.
        context_length: tokens the KV cache holds.
        use_mmap: map the weights instead of copying them.
        repack: let llama.cpp keep a second, rearranged copy of the weights for speed, where `repack_is_safe`.
        kv_float32: float32 KV cache and plain attention, for parity checks.
        kv_cache: otherwise f16 (llama.cpp's default) or q8_0, which needs flash attention and heads in blocks of 32.
        gpu_layers: layers on an accelerator, -1 = all.

    Raises:
        InputRejected: the file is not a GGUF that this llama.cpp can load; quotes llama.cpp's own message.
        ConfigError: an unknown precision of the KV cache.
        ResourceProblem: the context does not fit into memory, or its heads not into the cache's blocks.
    """

    name = "llama_cpp"

    def __init__(
        self,
        path: Path,
        threads: int,
        context_length: int,
        *,
        use_mmap: bool = True,
        repack: bool = True,
        kv_float32: bool = False,
        kv_cache: str = "f16",
        gpu_layers: int = 0,
    ) -> None:
        self._model = self._context = None
        if kv_cache not in KV_TYPES:
            raise ConfigError(f"unknown KV cache '{kv_cache}'", why=f"known: {', '.join(KV_TYPES)}")
        self.path, self.context_length = path, context_length
        self.repacks = repack and repack_is_safe()
        self._model = load_gguf(path, use_mmap=use_mmap, repack=self.repacks, gpu_layers=gpu_layers)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocab = int(lib.llama_vocab_n_tokens(self._vocab))
        self._context = self._open_context(threads, kv_float32, kv_cache)
        self._position = 0

    def _open_context(self, threads: int, kv_float32: bool, kv_cache: str) -> lib.llama_context_p:
        params = lib.llama_context_default_params()
        params.n_ctx = self.context_length
        params.n_batch = params.n_ubatch = min(PREFILL_BATCH_TOKENS, self.context_length)
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        if kv_float32:
            params.type_k = params.type_v = _F32
            params.flash_attn_type = _FLASH_ATTENTION_OFF
        elif kv_cache != "f16":
            params.type_k = params.type_v = KV_TYPES[kv_cache]
            params.flash_attn_type = _FLASH_ATTENTION_ON  # llama.cpp reads quantized values only there
        context: lib.llama_context_p = lib.llama_init_from_model(self._model, params)
        if not context:
            why = last_errors()
            self.close()
            raise ResourceProblem(
                f"llama.cpp could not create a context of {self.context_length} tokens", where=str(self.path), why=why
            )
        return context

    def logits(self, ids_S: np.ndarray) -> np.ndarray:
        """Logits [S, V] float32 of every position, from an empty context."""
        out_SV = np.empty((len(ids_S), self.vocab), dtype=np.float32)
        ids_S = self._reset(ids_S)
        for start in range(0, len(ids_S), LOGITS_BATCH_TOKENS):
            chunk = ids_S[start : start + LOGITS_BATCH_TOKENS]
            self._decode(chunk, every_position=True)
            for row in range(len(chunk)):
                out_SV[start + row] = self._row(row)
        return out_SV

    def prefill(self, ids_S: np.ndarray) -> np.ndarray:
        """Empty the context, read the prompt, return the last position's logits [V] float32."""
        ids_S = self._reset(ids_S)
        for start in range(0, len(ids_S), PREFILL_BATCH_TOKENS):
            self._decode(ids_S[start : start + PREFILL_BATCH_TOKENS], every_position=False)
        return self._row(-1)

    def step(self, token: int) -> np.ndarray:
        """Append one token to the context and return its logits [V] float32."""
        self._decode(self._checked([token]), every_position=False)
        return self._row(-1)

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text` by llama.cpp's own tokenizer."""
        self._require_open()
        return tokenize(self._vocab, text, add_special, parse_special)

    def detokenize(self, ids: Sequence[int]) -> bytes:
        """UTF-8 of the tokens without special ones; a text cut inside a character ends with half of it."""
        self._require_open()
        tokens = (lib.llama_token * len(ids))(*ids)
        count = lib.llama_detokenize(self._vocab, tokens, len(ids), None, 0, True, False)
        text = ctypes.create_string_buffer(max(-count, 1))
        count = lib.llama_detokenize(self._vocab, tokens, len(ids), text, len(text), True, False)
        return text.raw[:count]

    def end_ids(self) -> frozenset[int]:
        """Every token that ends an answer, by the file's own metadata."""
        self._require_open()
        return frozenset(token for token in range(self.vocab) if lib.llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        """Free the context and the model; closing twice is harmless."""
        if self._context:
            lib.llama_free(self._context)
        if self._model:
            lib.llama_model_free(self._model)
        self._context = self._model = None

    def _reset(self, ids_S: np.ndarray) -> np.ndarray:
        """Empty the context for these tokens."""
        self._position = 0
        ids_S = self._checked(ids_S)
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        return ids_S

    def _require_open(self) -> None:
        """Raises ConfigError after `close`: libllama would take the process with it."""
        if self._context is None:
            raise ConfigError("the runtime is closed", where=str(self.path))

    def _checked(self, ids_S: Sequence[int] | np.ndarray) -> np.ndarray:
        self._require_open()
        return checked_tokens(ids_S, self._position, self.context_length, self.vocab, self.path)

    def _decode(self, tokens: np.ndarray, every_position: bool) -> None:
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for row, token in enumerate(tokens):
                batch.token[row], batch.pos[row] = int(token), self._position + row
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
                batch.logits[row] = every_position or row == len(tokens) - 1
            status = lib.llama_decode(self._context, batch)
        finally:
            lib.llama_batch_free(batch)
        if status != 0:
            raise ResourceProblem(
                f"llama.cpp could not decode (status {status})", where=str(self.path), why=last_errors()
            )
        self._position += len(tokens)

    def _row(self, row: int) -> np.ndarray:
        pointer = lib.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, (self.vocab,)).copy()


def load_gguf(
    path: Path, *, use_mmap: bool = True, repack: bool = True, gpu_layers: int = 0, vocab_only: bool = False
) -> lib.llama_model_p:
    """Load a GGUF file, its header checked first; the caller frees the model.

    Raises:
        InputRejected: the header is not sane, or llama.cpp refuses the file, with its own words.
        ResourceProblem: those words are that memory ran out.
    """
    for part in parts_of(path):
        check_gguf_header(part)
    quiet_llama()
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = gpu_layers
    params.load_mode = _MODE_MMAP if use_mmap else _MODE_NONE
    params.use_extra_bufts = repack and repack_is_safe()
    params.vocab_only = vocab_only
    model: lib.llama_model_p = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        why = last_errors()
        if says_exhausted(why):
            raise ResourceProblem("there is no memory for this file", where=str(path), why=why)
        raise InputRejected("llama.cpp cannot load this file", where=str(path), why=why)
    return model


def repack_is_safe() -> bool:
    """False for a llama.cpp built with AMX: its rearranged weights then go through AMX tiles, and gcc 12 compiles the
    set-up of the tiles wrongly, so that the first product of quantized weights kills the process (SIGSEGV)."""
    return b"AMX_INT8 = 1" not in lib.llama_print_system_info()


def tokenize(vocab: lib.llama_vocab_p, text: str, add_special: bool, parse_special: bool) -> list[int]:
    """Token ids of `text` by a loaded vocabulary."""
    raw = text.encode()
    room = len(raw) + 8
    ids = (lib.llama_token * room)()
    count = lib.llama_tokenize(vocab, raw, len(raw), ids, room, add_special, parse_special)
    if count < 0:
        raise InputRejected("llama.cpp needs more tokens than bytes for a text", why=repr(text[:80]))
    return list(ctypes.cast(ids, ctypes.POINTER(lib.llama_token))[:count])


def quiet_llama() -> None:
    """Take over the log of libllama and forget earlier errors; call before every entry into the library."""
    _recent_errors.clear()
    lib.llama_log_set(_receive_log, ctypes.c_void_p(0))


def last_errors() -> str:
    """What libllama complained about since `quiet_llama`, or that it gave no reason."""
    return " | ".join(_recent_errors) or "llama.cpp gave no reason"


@lib.llama_log_callback  # type: ignore[untyped-decorator]  # a ctypes function type
def _receive_log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    global _last_level
    _last_level = _last_level if level == _CONTINUED else level
    line = text.decode("utf-8", "replace").rstrip("\n")
    if not line.strip(". \n"):
        return
    if _last_level == _ERROR:
        _recent_errors.append(line)
    log.debug("%s", line)
