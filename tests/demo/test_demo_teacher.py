"""Tests of the shipped demo teacher and of the script that trains it.

What: facts about the delivered folder (size, architecture, tokenizer, card, quality) and, on a tiny
configuration, that training runs and resumes to bit-identical weights.
Why: everything else in the package develops and demonstrates against this folder.
How: `pytest tests/demo`; needs nothing outside the repository.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from moe_edge.demo import demo_teacher_path
from moe_edge.demo.checkpoint import export_teacher
from moe_edge.demo.corpus import TokenStream, content_bytes, encode_documents
from moe_edge.demo.evaluate import evaluate, load_teacher, make_row
from moe_edge.demo.model import balance_loss
from moe_edge.demo.train import main as train_main

MAX_WEIGHT_BYTES = 32_000_000
CONVERSATIONS = [
    [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
    ],
    [
        {"role": "user", "content": "Name three animals that live in the sea."},
        {"role": "assistant", "content": "Whales, dolphins and sharks live in the sea."},
    ],
]
LANGUAGES = ["Grüße aus Köln", "こんにちは世界", "Привет, мир", "مرحبا بالعالم", "नमस्ते", "🦜🧪\t\n"]


@pytest.fixture(scope="module")
def teacher():
    """The shipped model in float32 and its tokenizer."""
    return load_teacher(demo_teacher_path())


@pytest.fixture(scope="module")
def config() -> dict:
    """The shipped `config.json` as written."""
    return json.loads((demo_teacher_path() / "config.json").read_text(encoding="utf-8"))


def test_weights_fit_the_size_limit_and_are_bfloat16():
    path = demo_teacher_path() / "model.safetensors"
    assert path.stat().st_size <= MAX_WEIGHT_BYTES
    with safe_open(path, framework="pt") as weights:
        names = list(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
        assert "lm_head.weight" not in names


def test_config_names_the_architecture_under_both_expert_keys(config):
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["num_experts"] == config["num_local_experts"] >= 16
    assert config["num_experts_per_tok"] == 4
    assert config["norm_topk_prob"] is True
    assert config["tie_word_embeddings"] is True
    assert config["decoder_sparse_step"] == 1
    assert config["mlp_only_layers"] == []
    assert config["hidden_size"] % 256 == 0
    assert config["moe_intermediate_size"] % 256 == 0


def test_most_parameters_are_in_routed_experts(teacher):
    model, _ = teacher
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    assert routed / sum(sizes.values()) >= 0.60
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("text", LANGUAGES)
def test_tokenizer_round_trips_any_language(teacher, text):
    _, tokenizer = teacher
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_knows_every_byte_and_its_special_tokens(teacher):
    _, tokenizer = teacher
    assert set(ByteLevel.alphabet()) <= set(tokenizer.get_vocab())
    assert len(ByteLevel.alphabet()) == 256
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.is_fast


def test_chat_template_renders_with_and_without_generation_prompt(teacher):
    _, tokenizer = teacher
    user = CONVERSATIONS[0][:1]
    turn = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    assert tokenizer.apply_chat_template(user, tokenize=False) == turn
    prompt = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    assert prompt == turn + "<|im_start|>assistant\n"


def test_template_travels_in_the_tokenizer_config():
    text = (demo_teacher_path() / "tokenizer_config.json").read_text(encoding="utf-8")
    assert "<|im_start|>" in json.loads(text)["chat_template"]


def test_card_names_sources_licence_and_measurement():
    card = (demo_teacher_path() / "README.md").read_text(encoding="utf-8")
    for fact in ("databricks-dolly-15k", "WikiText-2", "CC BY-SA 3.0", "Bits per byte", "seed"):
        assert fact in card
    assert not re.search(r"(?m)(^|[\s`(=])/\w", card), "the card names an absolute path"


def test_teacher_predicts_plain_english_and_uses_many_experts(teacher):
    result = evaluate(*teacher, CONVERSATIONS)
    assert result.bits_per_byte < 3.5  # a uniform byte model needs 8
    assert result.scored_bytes == sum(map(content_bytes, CONVERSATIONS))
    assert all(sum(share > 0 for share in layer) >= 8 for layer in result.expert_shares)


def test_teacher_answers_a_chat_prompt(teacher):
    model, tokenizer = teacher
    prompt = tokenizer.apply_chat_template(
        CONVERSATIONS[0][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert generated.shape[1] > prompt["input_ids"].shape[1]


def test_cut_row_counts_only_the_kept_bytes(teacher):
    _, tokenizer = teacher
    whole = make_row(tokenizer, CONVERSATIONS[0], 2048)
    cut = make_row(tokenizer, CONVERSATIONS[0], 6)
    assert not whole.was_cut and cut.was_cut
    kept_text = tokenizer.decode(cut.token_ids)
    assert cut.scored_bytes == len(kept_text.removeprefix("<|im_start|>user\n").encode())


def test_balance_loss_is_one_when_even_and_grows_when_one_expert_takes_all():
    even_TE = torch.eye(8) * 10
    one_TE = torch.zeros(8, 8)
    one_TE[:, 0] = 10
    assert balance_loss((even_TE,), top_k=1).item() == pytest.approx(1.0, abs=1e-4)
    assert balance_loss((one_TE,), top_k=1).item() > 7
    # Opposite overloads in two layers must not cancel out.
    assert balance_loss((one_TE, one_TE.flip(-1)), top_k=1).item() > 7


def test_stream_serves_each_document_once_per_epoch(teacher):
    _, tokenizer = teacher
    stream = TokenStream(encode_documents(tokenizer, ["one", "two two", "three"]), seed=1)
    first = stream.read(0, stream.epoch_tokens)
    second = stream.read(stream.epoch_tokens, stream.epoch_tokens)
    assert sorted(first) == sorted(second)
    joined = stream.read(3, stream.epoch_tokens)
    assert list(joined) == [*first[3:], *second[:3]]


TINY_SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}


def write_tiny_corpus(folder: Path) -> list[str]:
    """A few records in the two input formats; returns the options that name them."""
    records = [
        {"instruction": f"Count to {n}.", "input": "", "output": ", ".join(map(str, range(n)))} for n in range(3, 30)
    ]
    lines = "\n".join(json.dumps(record) for record in records)
    (folder / "dolly.jsonl").write_text(lines, encoding="utf-8")
    wikitext = " \n = Numbers = \n \n One is a number . \n \n = = Two = = \n \n Two is even . \n"
    (folder / "wikitext.txt").write_text(wikitext * 5, encoding="utf-8")
    return [
        f"--dolly-train={folder / 'dolly.jsonl'}",
        f"--wikitext={folder / 'wikitext.txt'}",
    ]


def tiny_training(corpus_options: list[str], out: Path, *more: str) -> dict[str, torch.Tensor]:
    """Run the training script for at most two steps; returns the checkpoint's weights."""
    shape = [f"--{name.replace('_', '-')}={value}" for name, value in TINY_SHAPE.items()]
    sizes = ["--steps=2", "--batch-tokens=64", "--row-tokens=16", "--warmup-steps=1"]
    train_main([*corpus_options, f"--out={out}", *shape, *sizes, "--log-every=1", *more])
    return load_file(out / "checkpoint" / "weights.safetensors")


def test_resumed_training_gives_bit_identical_weights(tmp_path):
    corpus_options = write_tiny_corpus(tmp_path)
    whole = tiny_training(corpus_options, tmp_path / "whole")
    half = tiny_training(corpus_options, tmp_path / "parts", "--stop-after=1")
    resumed = tiny_training(corpus_options, tmp_path / "parts", "--resume")
    assert any(not torch.equal(whole[name], half[name]) for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert all(math.isfinite(weight.sum().item()) for weight in whole.values())


def test_training_exports_a_loadable_teacher_without_pickle(tmp_path):
    tiny_training(write_tiny_corpus(tmp_path), tmp_path / "run")
    model, tokenizer = load_teacher(tmp_path / "run" / "teacher")
    assert model.config.num_experts == TINY_SHAPE["num_experts"]
    suffixes = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json"}
    export_teacher(model, tokenizer, tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").vocab_size == tokenizer.vocab_size
