"""The capability table: every family is decided for every runtime, and what a runtime would compute wrongly is refused."""

from dataclasses import replace

import pytest

from moe_edge.contracts import capabilities
from moe_edge.contracts.capabilities import (
    CAPABILITIES,
    NEVER,
    PADDING,
    advice,
    capability,
    refusals,
    require_paddable,
    unpaddable,
)
from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.spec import FEATURES
from moe_edge.exporting.gguf_layout import LAYOUTS
from moe_edge.exporting.onnx_graph import ATTENTION
from moe_edge.families import FAMILIES, family_of
from tests.tiny import tiny_model

RUNTIMES = ("llama_cpp", "ort")


def spec_of(family: str, **overrides):
    config = tiny_model(family, **overrides).config.to_dict()
    return family_of(config).spec(config)


@pytest.fixture(scope="module")
def qwen3():
    return spec_of("qwen3_moe")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_family_is_decided(runtime, family):
    assert ((runtime, family) in CAPABILITIES) != ((runtime, family) in NEVER)


def test_what_is_exported_has_an_exporter():
    for (runtime, family), row in CAPABILITIES.items():
        if row.exported:
            assert family in (LAYOUTS if runtime == "llama_cpp" else ATTENTION), (runtime, family)
        assert row.computes <= set(FEATURES) and row.architecture


def test_a_family_without_exporter_says_so_and_flipping_its_row_admits_it(qwen3, monkeypatch):
    hunyuan = replace(qwen3, family="hunyuan_v1_moe", norm_after_rope=True, moe=replace(qwen3.moe, shared_width=32))
    row = replace(CAPABILITIES["llama_cpp", "hunyuan_v1_moe"], exported=False)
    monkeypatch.setitem(capabilities.CAPABILITIES, ("llama_cpp", "hunyuan_v1_moe"), row)
    assert refusals("llama_cpp", hunyuan) == ["moe-edge does not yet export hunyuan_v1_moe for llama_cpp (hunyuan-moe)"]
    row = replace(row, exported=True)
    monkeypatch.setitem(capabilities.CAPABILITIES, ("llama_cpp", "hunyuan_v1_moe"), row)
    assert refusals("llama_cpp", hunyuan) == []


def test_phimoe_and_latent_attention_are_refused_for_good(qwen3):
    assert "approximates" in refusals("llama_cpp", replace(qwen3, family="phimoe"))[0]
    assert "latent" in refusals("ort", replace(qwen3, family="deepseek_v3"))[0]


@pytest.mark.parametrize(
    ("runtime", "changes", "words"),
    [
        ("llama_cpp", {"sinks": True}, "attention sinks"),
        ("ort", {"rope_scaling": {"rope_type": "yarn"}}, "scaled rotary"),
        ("llama_cpp", {"sliding_window": 16}, "sliding window"),
        ("llama_cpp", {"clip_qkv": 8.0}, "clip_qkv"),
        ("llama_cpp", {"dense_layers": (0,)}, "layers without experts"),
    ],
)
def test_what_a_graph_does_not_compute_is_named(qwen3, runtime, changes, words):
    assert refusals(runtime, qwen3) == []
    assert words in refusals(runtime, replace(qwen3, **changes))[0]


def test_the_normalisation_of_the_top_k_must_be_the_graphs(qwen3):
    other = replace(qwen3, moe=replace(qwen3.moe, renormalise=False))
    assert "norm_topk_prob" in refusals("llama_cpp", other)[0] and refusals("ort", other) == []


def test_gguf_takes_at_most_1024_experts(qwen3):
    many = replace(qwen3, moe=replace(qwen3.moe, experts=1025))
    assert "at most 1024" in refusals("llama_cpp", many)[0] and refusals("ort", many) == []


@pytest.mark.parametrize(("experts", "fused"), [(64, True), (288, True), (576, True), (1024, False), (48, False)])
def test_cuda_routes_some_counts_unfused(qwen3, experts, fused):
    wide = replace(qwen3, hidden=256, moe=replace(qwen3.moe, expert_width=256))
    assert (advice("llama_cpp", wide, experts, on_gpu=True) == []) == fused
    assert advice("llama_cpp", wide, experts, on_gpu=False) == [] == advice("ort", wide, experts, on_gpu=True)


def test_odd_widths_are_pointed_out(qwen3):
    assert "hidden size 64 and expert width 32" in advice("llama_cpp", qwen3, 4, on_gpu=False)[0]
    wide = replace(qwen3, hidden=256, moe=replace(qwen3.moe, expert_width=512))
    assert "expert width 128" in advice("llama_cpp", wide, 4, on_gpu=False, width=128)[0]


def test_an_unknown_family_is_not_guessed(qwen3):
    assert capability("ort", "mamba") is None and "does not know" in refusals("ort", replace(qwen3, family="mamba"))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_allowed_just_where_a_bias_decides_before_anything_is_normalised(family):
    moe = spec_of(family).moe
    expected = "router_bias" if moe.router_bias and moe.gating == "softmax_topk" else None
    expected = "selection_bias" if moe.selection_bias and moe.gating == "sigmoid" else expected
    assert PADDING.get(family) == expected
    assert (unpaddable(spec_of(family)) is None) == (expected is not None)


def test_a_bias_that_this_model_lacks_is_named():
    without = spec_of("lfm2_moe", use_expert_bias=False)
    assert "no a bias" not in unpaddable(without) and "selects experts" in unpaddable(without)
    with pytest.raises(InputRejected, match="selects experts") as caught:
        require_paddable(without)
    assert caught.value.next_command == "--set plan.uneven=false"
