"""Sizes from headers: equal to the real files where there are files, to hand-computed numbers where there are none."""

import pytest

from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.quantization import RECIPE_ORDER, layer_thirds
from moe_edge.contracts.targets_io import load_target
from moe_edge.families import family_of
from moe_edge.models.students import count_params
from moe_edge.planning.estimate import (
    Cache,
    Packing,
    buffer_bytes,
    decode_bytes,
    estimate,
    file_bytes,
    kv_cache_bytes,
    kv_precisions,
    machine_of,
    stored_groups,
    tensor_data_bytes,
)
from moe_edge.planning.headers import model_headers, tokenizer_bytes
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.planning.plan_helpers import headers, model
from tests.tiny import FAMILY_NAMES, tiny_checkpoint

gguf = pytest.importorskip("gguf")
F16 = Packing("gguf", "F16")
Q4 = Packing("gguf", "Q4_K_M")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_parameters_are_those_of_the_checkpoint(tmp_path, family):
    checkpoint = headers(tmp_path, family)
    row = family_of(checkpoint.config)
    counts = count_params(row.spec(checkpoint.config), row.tensors(checkpoint.config, checkpoint.tensors))
    seen = model_headers(checkpoint)
    assert seen.params_total(8) == counts.total
    assert seen.params_active(8, 2) == counts.active
    assert seen.params_total(8) - seen.params_total(5) == counts.routed * 3 // 8 + 3 * 256 * 2, (
        "experts and router rows"
    )


@pytest.mark.parametrize(("family", "tied"), [("qwen3_moe", True), ("qwen3_moe", False), ("qwen2_moe", True)])
def test_the_f16_file_is_predicted(tmp_path, family, tied):
    """Tensor bytes exactly, a tied head written out where llama.cpp demands it, the whole file within its metadata."""
    from moe_edge.exporting.gguf import write_gguf

    folder = tiny_checkpoint(tmp_path, family, experts=6, hidden=64, width=48, tied=tied, vocab=320)
    seen = model_headers(inspect_checkpoint(folder))
    write_gguf(folder, tmp_path / "model.gguf", name="tiny")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert tensor_data_bytes(seen, 6, F16) == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert sum(group.tensors for group in stored_groups(seen, 6, F16)) == len(reader.tensors)
    real = (tmp_path / "model.gguf").stat().st_size
    assert abs(file_bytes(seen, 6, F16) - real) < 16_384, "hyperparameters and chat template are a round number"


def test_experts_are_the_only_thing_that_shrinks(tmp_path):
    seen = model(tmp_path)
    per_expert = 2 * 2 * (3 * 256 * 256) + 4 * 2 * 256  # two layers: float16 matrices, float32 router row
    assert tensor_data_bytes(seen, 8, F16) - tensor_data_bytes(seen, 7, F16) == per_expert


def test_recipes_shrink_in_their_order(tmp_path):
    seen = model(tmp_path)
    sizes = [file_bytes(seen, 8, Packing("gguf", name)) for name in RECIPE_ORDER]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    onnx = [file_bytes(seen, 8, Packing("onnx", name)) for name in ("fp32", "fp16", "int8", "int4")]
    assert onnx == sorted(onnx, reverse=True)


def test_int4_blocks_carry_a_scale_and_a_zero_point(tmp_path):
    seen = model(tmp_path)
    per_expert = 2 * 3 * (256 * 256 // 2 + 256 * 256 // 32 * 5 // 2) + 4 * 2 * 256  # 4 bits, float16 scale, 4-bit zero
    int4 = Packing("onnx", "int4")
    assert tensor_data_bytes(seen, 8, int4) - tensor_data_bytes(seen, 7, int4) == per_expert


def test_decoding_reads_what_is_used_once(tmp_path):
    """Dropping experts leaves the bytes per token alone, halving top-k does not."""
    seen = model(tmp_path)
    cache = Cache(100)
    full, kept = decode_bytes(seen, 8, 2, Q4, cache), decode_bytes(seen, 4, 2, Q4, cache)
    assert full - kept == 4 * 2 * 4 * 256, "only the router's four rows"
    experts = (
        sum(
            group.tensors * 8 * 256 * 256 for group in seen.groups if group.tensor_class in ("expert_gate", "expert_up")
        )
        // 256
        * 144
    )
    assert decode_bytes(seen, 8, 1, Q4, cache) < full - experts // 8
    untied = tensor_data_bytes(seen, 8, Q4) + kv_cache_bytes(seen, cache)
    assert full < untied - 320 * 256 // 2, "the embedding is one row where the head is a tensor of its own"


def test_the_kv_cache_is_two_numbers_per_head_layer_and_token(tmp_path):
    seen = model(tmp_path)
    values = 2 * 2 * 2 * seen.spec.head_dim * 1000  # keys and values, layers, key-value heads
    assert kv_cache_bytes(seen, Cache(1000)) == 2 * values
    assert kv_cache_bytes(seen, Cache(1000, "q8_0")) == values // 32 * 34, "a float16 scale per block of 32"
    assert kv_cache_bytes(seen, Cache(1000), "onnx") == 4 * values, "our graphs cache in float32"


def test_an_8_bit_cache_needs_gguf_and_whole_blocks(tmp_path):
    seen, target = model(tmp_path), load_target("jetson")
    assert kv_precisions(seen, target, "gguf") == ("f16", "q8_0") and kv_precisions(seen, target, "onnx") == ("f16",)
    odd = model(tmp_path / "odd", head_dim=48, hidden=192)
    assert kv_precisions(odd, target, "gguf") == ("f16",)
    fixed = target.model_copy(update={"runtime": target.runtime.model_copy(update={"kv_cache": "q8_0"})})
    assert kv_precisions(seen, fixed, "gguf") == ("q8_0",)


def test_narrower_experts_shrink_the_file_and_the_bytes_per_token(tmp_path):
    seen, half = model(tmp_path, width=512), model(tmp_path / "half", width=256)
    assert seen.params_total(8, 256) == half.params_total(8) and seen.params_active(8, 2, 256) == half.params_active(
        8, 2
    )
    assert file_bytes(seen, 8, Q4, 256) == file_bytes(half, 8, Q4)
    assert decode_bytes(seen, 8, 2, Q4, Cache(9), 256) == decode_bytes(half, 8, 2, Q4, Cache(9))
    expected = estimate(seen, load_target("mobile"), 4, 2, Q4, width=256)
    assert expected.routed_expert_share_kept == 0.25


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_mix_replaces_types_per_class_and_third_of_the_layers(tmp_path, layers):
    seen = model(tmp_path, layers=layers)
    plain = tensor_data_bytes(seen, 8, Q4)
    everywhere = tensor_data_bytes(seen, 8, Q4._replace(mix=(("expert_down", "Q2_K"),)))
    down = layers * 8 * 256  # rows of 256 weights, one block each
    assert plain - everywhere == down * (176 - 84), "Q5_K to Q2_K"
    first = layer_thirds(layers)[0]
    part = tensor_data_bytes(seen, 8, Q4._replace(mix=((f"expert_down@0-{first[-1]}", "Q2_K"),)))
    assert plain - part == len(first) * 8 * 256 * (176 - 84)
    assert Q4._replace(mix=(("shared", "Q8_0"),)).label == "Q4_K_M-mix"


def test_peak_memory_and_speed_add_up(tmp_path):
    seen, target = model(tmp_path), load_target("mobile")
    expected = estimate(seen, target, 6, 2, Q4)
    cache = Cache(target.context_length)
    kv = kv_cache_bytes(seen, cache)
    assert expected.peak_memory_bytes == expected.file_bytes + kv + buffer_bytes(seen)
    bandwidth = 76.8e9 * 0.6
    assert expected.decode_tokens_per_s == pytest.approx(bandwidth / decode_bytes(seen, 6, 2, Q4, cache))
    assert expected.routed_expert_share_kept == 0.75
    assert machine_of(target).bandwidth_bytes_per_s == pytest.approx(bandwidth)
    onnx = estimate(seen, target, 6, 2, Packing("onnx", "int4"))
    assert onnx.peak_memory_bytes == int(onnx.file_bytes * 1.5) + 2 * kv + buffer_bytes(seen), "a float32 cache"


def test_without_a_bandwidth_there_is_no_speed_and_the_hosts_memory_is_probed(tmp_path):
    target = load_target("cpu")
    assert estimate(model(tmp_path), target, 8, 2, Q4).decode_tokens_per_s is None
    machine = machine_of(target)
    assert machine.memory_bytes > 2**28 and machine.usable_bytes == int(machine.memory_bytes * 0.75)
    remote = target.model_copy(update={"device": "ssh://user@board"})
    assert machine_of(remote).usable_bytes is None


@pytest.mark.parametrize("content", [b"", b"\x00\xff\x80", b"[]", b'{"model": [1]}', b'{"model": {"vocab": [7]}}'])
def test_a_tokenizer_that_is_none_is_refused_by_its_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputRejected, match=r"tokenizer\.json"):
        tokenizer_bytes(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b'{"model": null, "added_tokens": null}')
    assert tokenizer_bytes(tmp_path) == 0
