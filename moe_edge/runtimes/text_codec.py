"""Text to tokens and back, for every kind of artifact, by the tokenizer that travels with it.

A GGUF file is asked through llama.cpp, as the device will ask it; folders bring a Hugging Face tokenizer. Both add what the
tokenizer itself puts before a text (a BOS where there is one) and read special tokens written in the text, as
transformers does. Ends differ on purpose: a folder names its own, llama.cpp adds those it knows by name (<|endoftext|>).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from moe_edge.contracts.errors import ConfigError
from moe_edge.models.loading import configured_ends, load_tokenizer
from moe_edge.runtimes.base import Runtime
from moe_edge.storage.checkpoint import require_tokenizer_files


class TextCodec(Protocol):
    """How an opened artifact reads and writes text."""

    stop_ids: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer without special tokens; bytes that are no UTF-8 become U+FFFD."""
        ...


class HfCodec:
    """The fast tokenizer of a checkpoint or ONNX folder."""

    def __init__(self, folder: Path) -> None:
        require_tokenizer_files(folder)  # transformers would invent one
        self._tokenizer = load_tokenizer(folder)
        known = {self._tokenizer.eos_token_id}.union(*configured_ends(folder).values())
        self.stop_ids = frozenset(token for token in known if token is not None)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        return list(self._tokenizer.encode(text, verbose=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer without special tokens."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # a list only for a batch
        return text


class LlamaCppCodec:
    """The tokenizer inside a GGUF file, run by llama.cpp."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self.stop_ids: frozenset[int] = runtime.end_ids()

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        return list(self._runtime.tokenize(text, add_special=True, parse_special=True))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer without special tokens."""
        return str(self._runtime.detokenize(ids).decode("utf-8", "replace"))


CODECS: dict[str, Callable[[Path, Runtime], TextCodec]] = {
    "hf": lambda path, runtime: HfCodec(path),
    "ort": lambda path, runtime: HfCodec(path),
    "llama_cpp": lambda path, runtime: LlamaCppCodec(runtime),
}


def open_codec(kind: str, path: Path, runtime: Runtime) -> TextCodec:
    """The codec of an open runtime.

    Raises:
        ConfigError: an unknown kind.
        InputRejected: the folder has no readable tokenizer.
    """
    if kind not in CODECS:
        raise ConfigError(f"no tokenizer is known for the runtime '{kind}'", why=f"known: {', '.join(CODECS)}")
    return CODECS[kind](path, runtime)
