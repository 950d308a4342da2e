"""A Hugging Face tokenizer as GGUF metadata, and the proof that both give the same ids.

What: `gguf_vocabulary` reads byte-level BPE (GPT-2, Qwen, Llama 3, OLMo) and SentencePiece-like BPE with byte fallback
(Llama 2, Mixtral); `verify_tokenizer` encodes a multilingual text with transformers and with llama.cpp. Why strict: a
tokenizer that is almost right gives a model that is almost sensible, and nothing reports it.
"""

import json
import logging
import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, Keys, TokenType
from llama_cpp import llama_cpp as lib

from moe_edge.contracts.errors import InputRejected
from moe_edge.exporting.gguf_pretokenizers import pre_tokenizer_name
from moe_edge.models.loading import configured_ends, load_tokenizer
from moe_edge.runtimes.llama_cpp import load_gguf, tokenize

log = logging.getLogger(__name__)

PROBE_TEXT = (
    "Hello world!  I've 3 or 33 or 3333 apples;\tit's 1.5 % more.\n\nDer Fluß hört's, «déjà vu» n'est-ce pas?\r\n"
    "我想在apple工作1314151天～ нещо на Български العربية हिन्दी 한국어 កាន់តែ 🚀🦙👩\u200d👧"
    " ===== '''``` x=f(a[1:], b)  # YES we'VE\n   end "
)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """What goes into tokenizer.ggml.*; `tokens` has one entry per row of the embedding."""

    model: str  # "gpt2": byte-level BPE, "llama": SentencePiece-like
    tokens: list[str]
    types: list[int]
    special_ids: dict[str, int]  # bos, eos, unk, pad, eot, eom
    add_bos: bool
    add_eos: bool
    pre: str | None = None
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_space_prefix: bool = False
    chat_templates: dict[str, str] = field(default_factory=dict)  # by name; "default" is the plain key


def gguf_vocabulary(checkpoint: Path, rows: int, pre_tokenizer: str | None) -> Vocabulary:
    """The vocabulary of the tokenizer in `checkpoint`, padded with unused tokens to `rows`.

    Raises:
        InputRejected: not a BPE, more tokens than rows, no end-of-sequence token, or an unknown pre-tokenizer.
    """
    tokenizer = load_tokenizer(checkpoint)
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parsed["model"]
    if model["type"] != "BPE":
        why = f"its model is {model['type']}, GGUF export knows BPE"
        raise InputRejected("the tokenizer cannot be exported", where="tokenizer.json", why=why)
    tokens, types = _token_table(parsed, rows)
    prefix, suffix = _automatic_ids(tokenizer)
    specials = _special_ids(tokenizer, checkpoint)
    vocabulary = Vocabulary(
        model="llama" if model.get("byte_fallback") else "gpt2",
        tokens=tokens,
        types=types,
        special_ids=specials | ({"bos": prefix[0]} if prefix else {}),
        add_bos=bool(prefix),
        add_eos=bool(suffix),
        chat_templates=_chat_templates(tokenizer),
    )
    if vocabulary.model == "llama":
        return replace(vocabulary, scores=_scores(model, tokens), add_space_prefix=_prepends_space(parsed))
    pre = pre_tokenizer or pre_tokenizer_name(parsed, partial(tokenizer.encode, verbose=False))
    return replace(vocabulary, pre=pre, merges=_merges(model))


def _token_table(parsed: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Token texts and types by id; llama.cpp aborts the process on a duplicate, so there must be none."""
    texts = {index: text for text, index in parsed["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, TokenType.NORMAL)
    if parsed["model"].get("byte_fallback"):
        kinds |= {index: TokenType.BYTE for index, text in texts.items() if _BYTE_TOKEN.fullmatch(text)}
        unknown = parsed["model"]["vocab"].get(parsed["model"].get("unk_token"))
        kinds |= {unknown: TokenType.UNKNOWN} if unknown is not None else {}
    for added in parsed["added_tokens"]:
        texts[added["id"]] = added["content"]
        if kinds.get(added["id"]) != TokenType.UNKNOWN:
            kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if max(texts) >= rows:
        why = f"token id {max(texts)} has no row in an embedding of {rows}"
        raise InputRejected("the tokenizer does not fit the model", where="tokenizer.json", why=why)
    tokens = [texts.get(index) or f"[PAD{index}]" for index in range(rows)]
    if len(set(tokens)) != rows:
        twice = next(text for text in tokens if tokens.count(text) > 1)
        raise InputRejected("a token appears twice", where="tokenizer.json", why=repr(twice))
    return tokens, [int(kinds.get(index, TokenType.UNUSED)) for index in range(rows)]


def _automatic_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that transformers itself puts before and after every text."""
    plain = tokenizer.encode("a", add_special_tokens=False, verbose=False)
    full = tokenizer.encode("a", add_special_tokens=True, verbose=False)
    start = next(i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain)
    prefix, suffix = full[:start], full[start + len(plain) :]
    if len(prefix) > 1 or len(suffix) > 1:
        why = f"transformers adds {prefix} before and {suffix} after a text, llama.cpp at most one token each"
        raise InputRejected("the tokenizer cannot be exported", where="tokenizer.json: post_processor", why=why)
    return prefix, suffix


def _special_ids(tokenizer: Any, checkpoint: Path) -> dict[str, int]:
    """bos, eos, unk, pad from the tokenizer; a missing eos from the model's configuration; further eos ids as eot and eom.

    All ids that the generation configuration or the configuration names end a text; llama.cpp has names for three, and knows
    some more by their text.

    llama.cpp takes token 11 where bos or eos is not written, so both always are: a tokenizer without bos repeats eos.
    """
    found = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    named = dict.fromkeys(end for ids in configured_ends(checkpoint).values() for end in ids)
    ends = [end for end in named if 0 <= end < len(tokenizer)]
    if found["eos"] is None and ends:
        found["eos"] = ends[0]
    if found["eos"] is None:
        why = "neither tokenizer_config.json nor generation_config.json names one, llama.cpp would take token 11"
        raise InputRejected("the tokenizer has no end-of-sequence token", where=str(checkpoint), why=why)
    found["bos"] = found["eos"] if found["bos"] is None else found["bos"]
    further = [end for end in ends if end != found["eos"]]
    found |= dict(zip(("eot", "eom"), further, strict=False))
    if unnamed := tokenizer.convert_ids_to_tokens(further[2:]):
        log.warning("GGUF has names for three ends of a text; llama.cpp may not stop at %s", ", ".join(unnamed))
    return {kind: int(index) for kind, index in found.items() if index is not None}


def _merges(model: dict[str, Any]) -> list[str]:
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    if any(" " in part for pair in pairs for part in pair):
        raise InputRejected("a merge contains a space", where="tokenizer.json", why="GGUF separates the parts by one")
    return [" ".join(pair) for pair in pairs]


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """SentencePiece scores from BPE ranks: llama.cpp merges the pair whose result scores highest."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault(merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge), rank)
    lowest = -float(len(ranks) + 1)
    return [-float(ranks[text]) if text in ranks else lowest for text in tokens]


def _prepends_space(parsed: dict[str, Any]) -> bool:
    described = json.dumps([parsed.get("normalizer"), parsed.get("pre_tokenizer")])
    return (
        '"Prepend"' in described
        or '"prepend_scheme": "first"' in described
        or '"prepend_scheme": "always"' in described
    )


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """The tokenizer.ggml.* keys."""
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    for kind, index in vocabulary.special_ids.items():
        key = {"unk": "unknown", "pad": "padding"}.get(kind, kind)
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    _write_chat_templates(writer, vocabulary.chat_templates)


def _chat_templates(tokenizer: Any) -> dict[str, str]:
    """The tokenizer's chat templates by name; one alone is the default."""
    found = tokenizer.chat_template or {}
    return {"default": found} if isinstance(found, str) else dict(found)


def _write_chat_templates(writer: GGUFWriter, templates: dict[str, str]) -> None:
    """The default under its plain key, the others by name in a fixed order (the writer's own list has the order of a set)."""
    others = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in sorted(templates.items()) if name != "default"}
    for name, text in others.items():
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), text)
    if others:
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, list(others))
    if "default" in templates:
        writer.add_chat_template(templates["default"])


def verify_tokenizer(gguf: Path, checkpoint: Path) -> None:
    """Compare transformers' and llama.cpp's ids of a multilingual text, with and without the automatic tokens.

    Raises:
        InputRejected: they differ; shows where.
    """
    tokenizer = load_tokenizer(checkpoint)
    model = load_gguf(gguf, vocab_only=True)
    try:
        vocab = lib.llama_model_get_vocab(model)
        for special in (False, True):
            expected = tokenizer.encode(PROBE_TEXT, add_special_tokens=special, verbose=False)
            actual = tokenize(vocab, PROBE_TEXT, add_special=special, parse_special=True)
            if expected != actual:
                raise InputRejected(
                    "llama.cpp splits text differently from this tokenizer",
                    where=str(checkpoint / "tokenizer.json"),
                    why=_first_difference(tokenizer, expected, actual),
                    next_command="try another splitter: --set export.gguf.pre_tokenizer=NAME",
                )
    finally:
        lib.llama_model_free(model)


def _first_difference(tokenizer: Any, expected: list[int], actual: list[int]) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b), min(len(expected), len(actual))
    )
    shown = tokenizer.decode(expected[max(0, at - 3) : at + 3])
    return f"at token {at}, near {shown!r}: transformers {expected[at : at + 4]}, llama.cpp {actual[at : at + 4]}"
