"""The llama.cpp runtime: logits, prefill and step agree, errors carry llama.cpp's reason, everything is freed."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from moe_edge.contracts.errors import ConfigError, EnvironmentProblem, InputRejected, ResourceProblem
from moe_edge.exporting.gguf import write_gguf
from moe_edge.runtimes import RUNTIMES, llama_cpp, open_runtime
from moe_edge.runtimes.base import Runtime, generate
from moe_edge.runtimes.llama_cpp import LOGITS_BATCH_TOKENS, LlamaCppRuntime
from tests.tiny import tiny_checkpoint

VOCAB = 320


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(tiny_checkpoint(folder, "qwen3_moe", vocab=VOCAB), folder / "x.gguf", name="x")
    return folder / "x.gguf"


def ids(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 300, tokens)


def test_it_is_a_runtime(gguf):
    with open_runtime("llama_cpp", gguf, threads=1, context_length=64) as runtime:
        assert isinstance(runtime, Runtime)
        assert (runtime.name, runtime.vocab) == ("llama_cpp", VOCAB)


def test_rows_longer_than_a_batch_do_not_differ_from_single_steps(gguf):
    prompt = ids(LOGITS_BATCH_TOKENS + 20)
    with LlamaCppRuntime(gguf, threads=1, context_length=256, kv_float32=True) as runtime:
        whole = runtime.logits(prompt)
        last = runtime.prefill(prompt[:-1])
        np.testing.assert_allclose(last, whole[-2], atol=2e-3)
        np.testing.assert_allclose(runtime.step(int(prompt[-1])), whole[-1], atol=2e-3)
    assert whole.dtype == np.float32


def test_every_call_starts_from_an_empty_context(gguf):
    with LlamaCppRuntime(gguf, threads=1, context_length=64) as runtime:
        first = runtime.logits(ids(20))
        runtime.logits(ids(40, seed=1))
        np.testing.assert_array_equal(runtime.logits(ids(20)), first)


def test_generate_stops_at_stop_ids(gguf):
    with LlamaCppRuntime(gguf, threads=1, context_length=64) as runtime:
        free = generate(runtime, ids(8), 6)
        assert len(free) == 6
        assert generate(runtime, ids(8), 6, stop_ids=[free[2]]) == free[: free.index(free[2])]
        assert generate(runtime, ids(8), 0) == []


@pytest.mark.parametrize("options", [{"use_mmap": False}, {"repack": False}, {"kv_float32": True}])
def test_options_change_speed_and_memory_not_the_model(gguf, options):
    with (
        LlamaCppRuntime(gguf, threads=1, context_length=64) as plain,
        LlamaCppRuntime(gguf, threads=1, context_length=64, **options) as other,
    ):
        np.testing.assert_allclose(other.logits(ids(20)), plain.logits(ids(20)), atol=2e-2)


def test_an_8_bit_cache_is_really_used_and_close_to_the_16_bit_one(gguf, monkeypatch):
    asked, real = [], llama_cpp.lib.llama_init_from_model

    def recorded(model, params):
        asked.append((params.type_k, params.type_v, params.flash_attn_type))
        return real(model, params)

    monkeypatch.setattr(llama_cpp.lib, "llama_init_from_model", recorded)
    with (
        LlamaCppRuntime(gguf, threads=1, context_length=64) as plain,
        LlamaCppRuntime(gguf, threads=1, context_length=64, kv_cache="q8_0") as small,
    ):
        first, second = plain.logits(ids(40)), small.logits(ids(40))
        assert 1e-5 < np.abs(first - second).max() < 0.2
        np.testing.assert_allclose(small.prefill(ids(40)), second[-1], atol=2e-2)
    assert asked[0][:2] == (1, 1) and asked[1] == (8, 8, 1)
    with pytest.raises(ConfigError, match="known: f16, q8_0"):
        LlamaCppRuntime(gguf, threads=1, context_length=64, kv_cache="q4_0")


def test_heads_that_8_bit_blocks_do_not_divide_are_refused_in_llama_cpps_words(tmp_path):
    write_gguf(tiny_checkpoint(tmp_path, "mixtral", vocab=VOCAB), tmp_path / "x.gguf", name="x")  # heads of 16
    with pytest.raises(ResourceProblem, match="could not create a context") as caught:
        LlamaCppRuntime(tmp_path / "x.gguf", threads=1, context_length=64, kv_cache="q8_0")
    assert "block size 32" in str(caught.value)


def test_limits_are_usage_errors(gguf):
    with LlamaCppRuntime(gguf, threads=1, context_length=64) as runtime:
        with pytest.raises(ConfigError, match="do not fit"):
            runtime.logits(ids(65))
        with pytest.raises(ConfigError, match="no tokens"):
            runtime.prefill(ids(0))
        with pytest.raises(ConfigError, match="outside the vocabulary"):
            runtime.prefill(np.array([1, VOCAB]))
        runtime.prefill(ids(64))
        with pytest.raises(ConfigError, match="64 tokens in the context and 1 more, limit 64"):
            runtime.step(5)


def test_closing_twice_is_harmless(gguf):
    runtime = LlamaCppRuntime(gguf, threads=1, context_length=64)
    runtime.close()
    runtime.close()
    assert runtime._model is None
    for ask in (lambda: runtime.prefill(ids(3)), lambda: runtime.step(1), lambda: runtime.tokenize("a")):
        with pytest.raises(ConfigError, match="closed"):  # libllama would take the process with it
            ask()


def test_a_foreign_architecture_is_rejected_with_llama_cpps_words(tmp_path, capfd):
    writer = GGUFWriter(tmp_path / "x.gguf", "no-such-arch")
    writer.add_tensor("t", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputRejected, match="unknown model architecture: 'no-such-arch'"):
        LlamaCppRuntime(tmp_path / "x.gguf", threads=1, context_length=64)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_a_crafted_file_never_reaches_llama_cpp(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    with pytest.raises(InputRejected, match="not a valid GGUF"):
        LlamaCppRuntime(tmp_path / "x.gguf", threads=1, context_length=64)


def test_unknown_and_missing_runtimes(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="known: hf, llama_cpp, ort"):
        open_runtime("vllm", tmp_path, 1, 64)
    monkeypatch.setitem(RUNTIMES, "absent", ("no_such_library", "X", "no-such-library"))
    with pytest.raises(EnvironmentProblem, match="pip install no-such-library"):
        open_runtime("absent", tmp_path, 1, 64)


@pytest.mark.parametrize(("info", "safe"), [(b"AVX2 = 1 | AMX_INT8 = 1 |", False), (b"AVX2 = 1 | REPACK = 1 |", True)])
def test_weights_are_not_rearranged_for_amx(monkeypatch: pytest.MonkeyPatch, info: bytes, safe: bool) -> None:
    monkeypatch.setattr(llama_cpp.lib, "llama_print_system_info", lambda: info)
    assert llama_cpp.repack_is_safe() is safe
