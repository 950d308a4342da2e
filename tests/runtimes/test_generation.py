"""Generation: side by side equals one by one, the seed fixes an answer, runtimes with equal logits draw equal tokens."""

from pathlib import Path

import numpy as np
import pytest

from moe_edge.contracts.errors import ConfigError
from moe_edge.exporting.gguf import write_gguf
from moe_edge.runtimes.base import Prompt, generate
from moe_edge.runtimes.hf import HfRuntime
from moe_edge.runtimes.llama_cpp import LlamaCppRuntime
from moe_edge.runtimes.sampling import GREEDY, RowNoise, Sampling
from moe_edge.runtimes.text_codec import open_codec
from tests.tiny import TEXTS, tiny_checkpoint

WARM = Sampling(0.8)
# lengths differ, so that a batch is padded; two rows share a prompt and differ in their random numbers
PROMPTS = [
    Prompt(np.random.default_rng(at).integers(3, 250, length).tolist(), f"row{at}-{length}", seed)
    for at, length, seed in [(0, 5, 10), (1, 11, 10), (2, 3, 10), (1, 11, 20)]
]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen3_moe", {}),
        ("mixtral", {"sliding_window": 6}),
        ("qwen3_5_moe", {"layers": 4}),
        ("lfm2_moe", {"layers": 4}),
    ],
)
def test_side_by_side_equals_one_by_one(tmp_path: Path, family: str, overrides: dict[str, int]) -> None:
    with HfRuntime(tiny_checkpoint(tmp_path, family, with_tokenizer=False, **overrides), 1, 64) as runtime:
        for sampling in (GREEDY, WARM):
            alone = [generate(runtime, p.ids, 12, (), sampling, RowNoise(p.seed, p.row)) for p in PROMPTS]
            assert runtime.generate_batch(PROMPTS, 12, (), sampling) == alone
        assert alone[1] != alone[3] and all(len(tokens) == 12 for tokens in alone)
        stops = {alone[1][4], alone[2][7]}
        expected = [tokens[: next((i for i, t in enumerate(tokens) if t in stops), 12)] for tokens in alone]
        assert runtime.generate_batch(PROMPTS, 12, stops, WARM) == expected
        assert min(map(len, expected)) < 12


def test_a_batch_does_not_obey_the_checkpoints_own_sampling(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen3_moe", with_tokenizer=False)
    with HfRuntime(folder, 1, 64) as runtime:
        expected = runtime.generate_batch(PROMPTS, 8, (), WARM)
    (folder / "generation_config.json").write_text('{"repetition_penalty": 5.0, "temperature": 0.1, "do_sample": true}')
    with HfRuntime(folder, 1, 64) as runtime:
        assert runtime.generate_batch(PROMPTS, 8, (), WARM) == expected


def test_what_does_not_fit_is_refused_before_the_first_token(tmp_path: Path) -> None:
    with HfRuntime(tiny_checkpoint(tmp_path, "qwen3_moe", with_tokenizer=False), 1, 16) as runtime:
        with pytest.raises(ConfigError, match="limit 16"):
            runtime.generate_batch(PROMPTS, 8, (), GREEDY)
        with pytest.raises(ConfigError, match="do not fit"):
            runtime.generate_batch([Prompt([])], 8, (), GREEDY)
        assert runtime.generate_batch(PROMPTS[:1], 0, (), GREEDY) == [[]]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its full-precision GGUF."""
    folder = tmp_path_factory.mktemp("twins")
    checkpoint = tiny_checkpoint(folder, "qwen3_moe", vocab=320)
    write_gguf(checkpoint, folder / "x.gguf", name="x")
    return checkpoint, folder / "x.gguf"


def test_two_runtimes_draw_the_same_tokens(twins: tuple[Path, Path]) -> None:
    with HfRuntime(twins[0], 1, 64) as hf, LlamaCppRuntime(twins[1], 1, 64, kv_float32=True) as llama:
        for sampling in (GREEDY, WARM):
            assert llama.generate_batch(PROMPTS, 8, (), sampling) == hf.generate_batch(PROMPTS, 8, (), sampling)


def test_both_codecs_read_and_write_the_same_text(twins: tuple[Path, Path]) -> None:
    with LlamaCppRuntime(twins[1], 1, 64) as llama:
        ours, theirs = open_codec("hf", twins[0], llama), open_codec("llama_cpp", twins[1], llama)
        assert ours.stop_ids == {2} and theirs.stop_ids == {0, 2}  # llama.cpp knows <|endoftext|> by its name
        for text in (*TEXTS, "<|im_start|>user\nHi<|im_end|>\n"):
            ids = ours.encode(text)
            assert theirs.encode(text) == ids
            assert theirs.decode(ids) == ours.decode(ids)
        assert theirs.decode(ours.encode(TEXTS[3])) == TEXTS[3]
        assert theirs.decode([]) == ours.decode([]) == ""
        half = ours.encode("€")[:1]
        assert "\ufffd" in ours.decode(half) and "\ufffd" in theirs.decode(half)


def test_an_unknown_runtime_has_no_codec(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="known: hf, ort, llama_cpp"):
        open_codec("vllm", tmp_path, None)
