"""Tokenizers in GGUF files: the same ids as transformers, for byte-level and SentencePiece-like BPE, or a refusal."""

import json
import re
from hashlib import sha256
from pathlib import Path

import pytest
from llama_cpp import llama_cpp as lib
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moe_edge.contracts.errors import GateFailed, InputRejected
from moe_edge.exporting import gguf
from moe_edge.exporting import gguf_pretokenizers as known
from moe_edge.exporting.gguf import write_gguf
from moe_edge.exporting.gguf_known_hashes import CHECK_TEXT, KNOWN_HASHES
from moe_edge.exporting.gguf_pretokenizers import pre_tokenizer_name
from moe_edge.exporting.gguf_tokenizer import PROBE_TEXT, gguf_vocabulary
from moe_edge.exporting.tokenizer_parity import ROUND_TRIP, check_tokenizer
from moe_edge.models.loading import load_tokenizer
from moe_edge.runtimes.gguf_header import check_gguf_header
from moe_edge.runtimes.llama_cpp import LlamaCppRuntime, load_gguf
from tests.exporting.gguf_models import representable
from tests.tiny import TEXTS

SENTENCES = (*TEXTS, PROBE_TEXT, "<|im_start|>user\nhi<|im_end|>\n", "  leading and trailing  ", "naïve café 🚀🚀 0x1F")


def byte_level(splitters: list, ignore_merges: bool = False, **special: str) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splitters, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", **special)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Llama 2 and Mixtral: spaces become U+2581, unknown characters fall back to bytes, bos is added."""
    texts = [" " + text for text in TEXTS]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trained.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False),
    )
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    bpe = Tokenizer(models.BPE(state["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def exported(tmp_path: Path, tokenizer: PreTrainedTokenizerFast | None = None, **kwargs) -> tuple[Path, Path]:
    checkpoint = representable(tmp_path, "mixtral", layers=1, vocab=420)
    if tokenizer is not None:
        for file in checkpoint.glob("*token*"):
            file.unlink()
        (checkpoint / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(checkpoint)
    write_gguf(checkpoint, tmp_path / "x.gguf", name="x", **kwargs)
    return checkpoint, tmp_path / "x.gguf"


TOKENIZERS = {
    "tiny": lambda: None,
    "smollm": lambda: byte_level(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split(Regex(known.GPT2), "isolated")]
    ),
    "qwen2": lambda: byte_level([pre_tokenizers.Split(Regex(known.QWEN2), "isolated")]),
    "llama-bpe": lambda: byte_level([pre_tokenizers.Split(Regex(known.LLAMA3), "isolated")], ignore_merges=True),
    "gpt-4o": lambda: byte_level([pre_tokenizers.Split(Regex(known.GPT4O), "isolated")]),
    "sentencepiece-like": sentencepiece_like,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_equal_transformers(tmp_path, kind):
    checkpoint, path = exported(tmp_path, TOKENIZERS[kind]())
    tokenizer = load_tokenizer(checkpoint)
    with LlamaCppRuntime(path, threads=1, context_length=32) as runtime:
        for text in SENTENCES:
            assert runtime.tokenize(text) == tokenizer.encode(text, add_special_tokens=False), text
            assert runtime.tokenize(text, add_special=True) == tokenizer.encode(text), text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_file_decodes_the_ids_itself(tmp_path, kind):
    checkpoint, path = exported(tmp_path, TOKENIZERS[kind]())
    with LlamaCppRuntime(path, threads=1, context_length=32) as runtime:
        found = check_tokenizer("gguf F16", load_tokenizer(checkpoint), runtime, path)
        assert found["text_returns"] and found["tokens"] == len(runtime.tokenize(ROUND_TRIP))


def test_ids_that_the_student_decodes_otherwise_are_refused(tmp_path):
    """Equal ids are not enough: what the device shows must be what the student says."""
    checkpoint, path = exported(tmp_path)
    tokenizer = load_tokenizer(checkpoint)
    with LlamaCppRuntime(path, threads=1, context_length=32) as runtime:
        tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("3", "4")])
        with pytest.raises(GateFailed, match="to another text(?s:.*)3 or 33 .* against .*4 or 44 "):
            check_tokenizer("gguf F16", tokenizer, runtime, path)


def test_special_ids_padding_and_template(tmp_path):
    checkpoint, path = exported(tmp_path)
    metadata = check_gguf_header(path).metadata
    rows, words = metadata["tokenizer.ggml.tokens"], len(load_tokenizer(checkpoint))
    assert len(rows) == 420
    assert rows[words:] == [f"[PAD{index}]" for index in range(words, 420)]
    assert set(metadata["tokenizer.ggml.token_type"][words:]) == {5}
    assert metadata["tokenizer.ggml.token_type"][:3] == [3, 3, 3]
    assert metadata["tokenizer.ggml.eos_token_id"] == 2
    assert metadata["tokenizer.ggml.padding_token_id"] == 0
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert "im_start" in metadata["tokenizer.chat_template"]


def test_a_tokenizer_without_a_chat_template_is_fine(tmp_path):
    _, path = exported(tmp_path, TOKENIZERS["qwen2"]())
    metadata = check_gguf_header(path).metadata
    assert "tokenizer.chat_template" not in metadata
    assert metadata["tokenizer.ggml.bos_token_id"] == metadata["tokenizer.ggml.eos_token_id"] == 0


def test_named_chat_templates_are_kept_in_a_fixed_order(tmp_path):
    plain = TOKENIZERS["qwen2"]()
    plain.chat_template = {"tool_use": "T", "default": "D", "a-b": "A"}
    metadata = check_gguf_header(exported(tmp_path, plain)[1]).metadata
    assert metadata["tokenizer.chat_template"] == "D" and metadata["tokenizer.chat_templates"] == ["a_b", "tool_use"]
    assert (metadata["tokenizer.chat_template.a_b"], metadata["tokenizer.chat_template.tool_use"]) == ("A", "T")


def test_an_unknown_splitter_is_refused_and_can_be_named(tmp_path):
    odd = byte_level([pre_tokenizers.Split(Regex(r"[aeiou]+|[^aeiou]+"), "isolated")])
    with pytest.raises(InputRejected, match=r"export\.gguf\.pre_tokenizer"):
        exported(tmp_path, odd)
    with pytest.raises(InputRejected, match="differently"):
        exported(tmp_path, odd, pre_tokenizer="gpt-2")
    with pytest.raises(InputRejected, match="unknown pre-tokenizer"):
        exported(tmp_path, odd, pre_tokenizer="no-such-name")


# What GPT-2's expression means, written as tiktoken does: no structure that is known here.
REWRITTEN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def hash_of(tokenizer: PreTrainedTokenizerFast) -> str:
    return sha256(str(tokenizer.encode(CHECK_TEXT)).encode()).hexdigest()


def test_an_unknown_structure_is_named_by_the_hash_of_its_ids(tmp_path, monkeypatch):
    rewritten = byte_level([pre_tokenizers.Split(Regex(REWRITTEN), "isolated")])
    with pytest.raises(InputRejected, match=f"nor is its hash {hash_of(rewritten)}"):
        exported(tmp_path, rewritten)
    monkeypatch.setitem(KNOWN_HASHES, hash_of(rewritten), "gpt-2")
    checkpoint, path = exported(tmp_path, rewritten)
    assert check_gguf_header(path).metadata["tokenizer.ggml.pre"] == "gpt-2"
    tokenizer = load_tokenizer(checkpoint)
    with LlamaCppRuntime(path, threads=1, context_length=32) as runtime:
        for text in SENTENCES:
            assert runtime.tokenize(text) == tokenizer.encode(text, add_special_tokens=False), text


def test_what_a_hash_names_is_still_compared(tmp_path, monkeypatch):
    odd = byte_level([pre_tokenizers.Split(Regex(r"[aeiou]+|[^aeiou]+"), "isolated")])
    monkeypatch.setitem(KNOWN_HASHES, hash_of(odd), "gpt-2")
    with pytest.raises(InputRejected, match="differently"):
        exported(tmp_path, odd)


def test_the_structure_comes_before_the_hash(tmp_path, monkeypatch):
    plain = TOKENIZERS["qwen2"]()
    monkeypatch.setitem(KNOWN_HASHES, hash_of(plain), "bloom")
    assert check_gguf_header(exported(tmp_path, plain)[1]).metadata["tokenizer.ggml.pre"] == "qwen2"


def test_the_installed_llama_cpp_knows_every_name_in_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "verify_tokenizer", lambda *given: None)  # these ids are not what is asked
    checkpoint = representable(tmp_path, "mixtral", layers=1, hidden=32, width=32)
    for name in sorted({*KNOWN_HASHES.values(), *known.PRE_TOKENIZERS.values()}):
        write_gguf(checkpoint, tmp_path / "x.gguf", name="x", pre_tokenizer=name)
        lib.llama_model_free(load_gguf(tmp_path / "x.gguf", vocab_only=True))
    write_gguf(checkpoint, tmp_path / "x.gguf", name="x", pre_tokenizer="bert-bge")
    with pytest.raises(InputRejected, match="unknown pre-tokenizer"):  # so that the loop can fail
        load_gguf(tmp_path / "x.gguf", vocab_only=True)


def test_every_hash_is_a_sha_256():
    assert len(KNOWN_HASHES) == 93 and all(re.fullmatch("[0-9a-f]{64}", key) for key in KNOWN_HASHES)
    assert sha256(CHECK_TEXT.encode()).hexdigest() == "a36179c1e2b1cfcfbfad1dc779addad2ffc778201e4cf0d538bddeafa2c526da"


def test_the_override_is_written(tmp_path):
    _, path = exported(tmp_path, pre_tokenizer="olmo")
    assert check_gguf_header(path).metadata["tokenizer.ggml.pre"] == "olmo"


def test_other_tokenizer_models_are_refused(tmp_path):
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("</s>", -2.0)], unk_id=0))
    with pytest.raises(InputRejected, match="Unigram"):
        exported(tmp_path, PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>"))


def test_more_tokens_than_rows_are_refused(tmp_path):
    with pytest.raises(InputRejected, match="no row"):
        gguf_vocabulary(representable(tmp_path, "mixtral"), 100, None)


def test_a_missing_end_token_comes_from_the_generation_config_or_is_refused(tmp_path):
    plain = byte_level([pre_tokenizers.Split(Regex(known.QWEN2), "isolated")])
    plain.eos_token = None
    checkpoint, path = exported(tmp_path, plain)
    assert check_gguf_header(path).metadata["tokenizer.ggml.eos_token_id"] == 2
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    vocabulary = gguf_vocabulary(checkpoint, 420, None)
    assert (vocabulary.special_ids["eos"], vocabulary.special_ids["eot"]) == (5, 7)
    assert vocabulary.special_ids["eom"] == 2, "the end of config.json is one, too"
    (checkpoint / "generation_config.json").unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    with pytest.raises(InputRejected, match="end-of-sequence"):
        gguf_vocabulary(checkpoint, 420, None)


def test_the_structure_decides_the_name():
    def named(*parts: dict, ignore_merges: bool = False) -> str:
        return pre_tokenizer_name(
            {
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(parts)},
                "model": {"ignore_merges": ignore_merges},
            },
            lambda text: [len(text)],
        )

    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert named(plain) == "gpt-2"
    assert named({"type": "Digits", "individual_digits": True}, plain) == "smollm"
    for wrong in (
        {**plain, "add_prefix_space": True},
        {"type": "Whitespace"},
        {"type": "Digits", "individual_digits": False},
    ):
        with pytest.raises(InputRejected, match="pre-tokenizer"):
            named(wrong)
    with pytest.raises(InputRejected, match="ignore_merges=True"):
        named(plain, ignore_merges=True)


@pytest.mark.parametrize("text", ['{"eos_token_id": "x"}', '{"eos_token_id": ["x", null]}', "[]", "{"])
def test_a_broken_generation_config_names_no_end(tmp_path, text):
    plain = byte_level([pre_tokenizers.Split(Regex(known.QWEN2), "isolated")])
    plain.eos_token = None
    checkpoint, _ = exported(tmp_path, plain)
    (checkpoint / "generation_config.json").write_text(text)
    vocabulary = gguf_vocabulary(checkpoint, 420, None)
    assert vocabulary.special_ids["eos"] == 2 and "eot" not in vocabulary.special_ids  # of config.json


def test_every_configured_end_ends_a_text_in_llama_cpp_or_is_named(tmp_path, caplog):
    checkpoint = representable(tmp_path, "mixtral", layers=1, vocab=420)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [2, 20, 21]}')
    path = tmp_path / "m.gguf"
    write_gguf(checkpoint, path, name="x")
    with LlamaCppRuntime(path, 1, 64) as runtime:
        assert {2, 20, 21} <= runtime.end_ids()
    assert "may not stop" not in caplog.text
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [2, 20, 21, 22]}')
    gguf_vocabulary(checkpoint, 420, None)
    assert f"may not stop at {load_tokenizer(checkpoint).convert_ids_to_tokens(22)}" in caplog.text
