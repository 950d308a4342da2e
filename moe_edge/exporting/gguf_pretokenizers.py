"""Which of llama.cpp's built-in text splitters a tokenizer.json is, read from its own pre_tokenizer.

What: `pre_tokenizer_name`. Why: llama.cpp implements splitting in C++ and selects it by name (`tokenizer.ggml.pre`); a
wrong name changes token ids silently. The structure itself is exact and needs no table of models; what it does not decide is
looked up by a hash of token ids, as llama.cpp's own converter does (gguf_known_hashes.py). Facts: src/llama-vocab.cpp.
"""

from collections.abc import Callable
from typing import Any

from moe_edge.contracts.errors import InputRejected
from moe_edge.exporting.gguf_known_hashes import CHECK_TEXT, KNOWN_HASHES, ids_hash

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
QWEN35 = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_SLASH_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _SLASH_TAIL
GPT4O = (
    f"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTION}?" + r"|\p{N}{1,3}" + _SLASH_TAIL
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# (split regexes in order, BPE's ignore_merges) -> name in llama.cpp
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((r"\p{N}", GPT2), False): "smollm",
    ((QWEN2,), False): "qwen2",
    ((QWEN35,), False): "qwen35",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((TEKKEN,), True): "tekken",
    ((GPT4O,), False): "gpt-4o",
    ((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK3), False): "deepseek-v3",
}


def pre_tokenizer_name(tokenizer: dict[str, Any], encode: Callable[[str], list[int]]) -> str:
    """llama.cpp's name for the splitting that a parsed byte-level tokenizer.json describes.

    Args:
        encode: the tokenizer's ids of a text, with its automatic tokens.

    Raises:
        InputRejected: llama.cpp has no such splitter under a name that we know; names the option that overrides.
    """
    steps = [step for part in _parts(tokenizer.get("pre_tokenizer")) for step in _regexes(part)]
    key = (tuple(steps), bool(tokenizer["model"].get("ignore_merges")))
    if key in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[key]
    found = ids_hash(encode(CHECK_TEXT))
    if found in KNOWN_HASHES:
        return KNOWN_HASHES[found]
    raise InputRejected(
        "llama.cpp has no pre-tokenizer that is known to split like this tokenizer",
        where="tokenizer.json: pre_tokenizer",
        why=f"splits by {steps}, ignore_merges={key[1]}; known: {', '.join(PRE_TOKENIZERS.values())}; nor is its hash {found}",
        next_command="name it yourself: --set export.gguf.pre_tokenizer=NAME (a round trip checks it)",
    )


def _parts(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    if not node:
        return []
    return [leaf for part in node["pretokenizers"] for leaf in _parts(part)] if node["type"] == "Sequence" else [node]


def _regexes(part: dict[str, Any]) -> list[str]:
    """The regexes by which one pre-tokenizer splits; something that no regex can say is named in angle brackets."""
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return [GPT2] if part.get("use_regex", True) else []
    if kind == "Digits":
        return [r"\p{N}"] if part.get("individual_digits") else [r"\p{N}+"]
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert") and "Regex" in part["pattern"]:
        return [part["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n")]
    return [f"<{kind}>"]
