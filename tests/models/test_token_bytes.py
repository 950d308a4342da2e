"""Tokens are the bytes that they stand for, whatever script a tokenizer writes them in."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_edge.contracts.errors import InputRejected
from moe_edge.models.token_bytes import token_bytes
from tests.families.sentencepiece import sentencepiece_tokenizer
from tests.tiny import TEXTS, tiny_tokenizer

HARD = "größer als 42 €, 你好 \U0001f600\n\ttab"


@pytest.mark.parametrize("text", [*TEXTS, HARD])
def test_byte_level_tokens_add_up_to_the_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    table = token_bytes(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(table[index] for index in ids) == text.encode()
    assert len(table) == len(tokenizer) and all(bytes([byte]) in table for byte in range(256))
    assert table[tokenizer.eos_token_id] == b"<|im_end|>"


@pytest.mark.parametrize("text", [*TEXTS, HARD])
def test_sentencepiece_tokens_add_up_to_the_text_after_a_space(text: str) -> None:
    tokenizer = sentencepiece_tokenizer()
    table = token_bytes(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(table[index] for index in ids) == b" " + text.encode()


def test_other_tokenizers_are_refused() -> None:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    with pytest.raises(InputRejected, match="its decoder is WordPiece"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"))
