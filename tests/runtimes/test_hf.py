"""The transformers runtime: its cached steps give the logits of a fresh pass, for every family and a sliding window."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.models.loading import load_model
from moe_edge.runtimes import open_runtime
from moe_edge.runtimes.base import Prompt, Runtime, generate
from moe_edge.runtimes.hf import HfRuntime
from moe_edge.runtimes.sampling import GREEDY
from tests.tiny import FAMILY_NAMES, tiny_checkpoint, tiny_ids

IDS = tiny_ids(tokens=20, rows=1)[0].numpy()
CASES = [(family, {}) for family in FAMILY_NAMES] + [("mixtral", {"sliding_window": 6})]


@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_steps_equal_a_fresh_pass(tmp_path: Path, family: str, overrides: dict[str, int]) -> None:
    folder = tiny_checkpoint(tmp_path, family, with_tokenizer=False, **overrides)
    with HfRuntime(folder, threads=1, context_length=64) as runtime:
        whole_SV = runtime.logits(IDS)
        assert whole_SV.shape == (20, 256) == (20, runtime.vocab) and whole_SV.dtype == np.float32
        rows = [runtime.prefill(IDS[:8]), *(runtime.step(int(token)) for token in IDS[8:])]
        np.testing.assert_allclose(np.stack(rows), whole_SV[7:], atol=2e-5, rtol=0)
        np.testing.assert_allclose(runtime.prefill(IDS[:8]), rows[0], atol=1e-6, rtol=0)
    with torch.no_grad():
        expected = load_model(folder)(torch.from_numpy(IDS)[None]).logits[0].numpy()
    np.testing.assert_array_equal(whole_SV, expected)


def test_logits_do_not_disturb_the_context(tmp_path: Path) -> None:
    runtime = HfRuntime(tiny_checkpoint(tmp_path, "olmoe", with_tokenizer=False), threads=1, context_length=64)
    runtime.prefill(IDS[:8])
    expected = runtime.step(9)
    runtime.prefill(IDS[:8])
    runtime.logits(IDS)
    np.testing.assert_array_equal(runtime.step(9), expected)


def test_it_opens_by_name_and_generates_greedily(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen3_moe", with_tokenizer=False)
    with open_runtime("hf", folder, threads=1, context_length=64) as runtime:
        assert isinstance(runtime, Runtime) and runtime.name == "hf"
        tokens = generate(runtime, IDS[:5], 6)
        context = list(IDS[:5])
        for token in tokens:
            assert token == int(runtime.logits(np.array(context))[-1].argmax())
            context.append(token)
        assert len(tokens) == 6
        assert generate(runtime, IDS[:5], 6, stop_ids={tokens[2]}) == tokens[: tokens.index(tokens[2])]


def test_the_context_has_an_end(tmp_path: Path) -> None:
    with HfRuntime(tiny_checkpoint(tmp_path, "mixtral", with_tokenizer=False), threads=0, context_length=8) as runtime:
        with pytest.raises(ConfigError, match="limit 8"):
            runtime.logits(IDS)
        with pytest.raises(ConfigError, match="do not fit"):
            runtime.logits(IDS[:0])
        with pytest.raises(ConfigError, match="prefill first"):
            runtime.step(1)
        runtime.prefill(IDS[:8])
        with pytest.raises(ConfigError, match="8 tokens in the context and 1 more"):
            runtime.step(1)


def test_closing_restores_the_threads_and_is_final(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    runtime = HfRuntime(
        tiny_checkpoint(tmp_path, "mixtral", with_tokenizer=False), threads=before + 1, context_length=8
    )
    assert torch.get_num_threads() == before + 1
    runtime.close()
    runtime.close()
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match="closed"):
        runtime.logits(IDS[:2])


def test_what_is_no_checkpoint_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match="missing"):
        HfRuntime(tmp_path, threads=1, context_length=8)
    with pytest.raises(ConfigError, match="does not exist"):
        HfRuntime(tmp_path / "none", threads=1, context_length=8)


@pytest.mark.parametrize("token", [-1, 256])
def test_a_token_outside_the_vocabulary_is_a_usage_error(tmp_path: Path, token: int) -> None:
    with HfRuntime(tiny_checkpoint(tmp_path, "olmoe", with_tokenizer=False), threads=1, context_length=64) as runtime:
        for ask in (runtime.logits, runtime.prefill):
            with pytest.raises(ConfigError, match=f"token id {token} is outside the vocabulary of 256"):
                ask(np.array([1, token]))
        runtime.prefill(IDS[:3])
        with pytest.raises(ConfigError, match="outside the vocabulary"):
            runtime.step(token)
        with pytest.raises(ConfigError, match="outside the vocabulary"):
            runtime.generate_batch([Prompt([1, token])], 4, (), GREEDY)


def test_no_prompt_has_no_answer(tmp_path: Path) -> None:
    with HfRuntime(tiny_checkpoint(tmp_path, "olmoe", with_tokenizer=False), threads=1, context_length=64) as runtime:
        assert runtime.generate_batch([], 4, (), GREEDY) == []
