"""The bytes that every token of a tokenizer stands for.

Two tokenizers can only be compared by bytes: characters may be split between tokens, and each kind writes its tokens in
its own script. Byte-level BPE maps every byte to a printable character; SentencePiece-like tokenizers write a space as
U+2581 and bytes without a character of their own as <0xNN>.
"""

import json
import re
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe_edge.contracts.errors import InputRejected

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """What each id stands for; b"" for ids without a token. Added tokens, special ones too, are their own text in UTF-8.

    Raises:
        InputRejected: neither byte-level nor SentencePiece-like, so that tokens do not add up to the text.
    """
    kinds = set(_decoder_types(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder")))
    if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
        why = f"its decoder is {', '.join(sorted(kinds)) or 'none'}; expected ByteLevel, Metaspace or ByteFallback"
        raise InputRejected("the tokenizer's tokens cannot be turned into bytes", where="tokenizer.json", why=why)
    spell = _byte_level if "ByteLevel" in kinds else _sentencepiece
    added = tokenizer.added_tokens_decoder
    table = [b""] * len(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if index < len(table):
            table[index] = token.encode() if index in added else spell(token)
    return table


def _decoder_types(decoder: Any) -> list[str]:
    """The types of a decoder and of all in its sequence."""
    if not isinstance(decoder, dict):
        return []
    inner = [kind for one in decoder.get("decoders", ()) for kind in _decoder_types(one)]
    return [str(decoder.get("type")), *inner]


def _byte_level(token: str) -> bytes:
    alphabet = _byte_alphabet()
    return b"".join(bytes([alphabet[sign]]) if sign in alphabet else sign.encode() for sign in token)


def _sentencepiece(token: str) -> bytes:
    found = _BYTE_PIECE.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else token.replace("\u2581", " ").encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """{character: byte} of byte-level BPE: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
