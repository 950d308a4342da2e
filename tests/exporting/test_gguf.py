"""The GGUF writer: every family against transformers, its metadata, its bytes and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_edge.contracts.capabilities import capability
from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.contracts.quantization import ALWAYS_F32
from moe_edge.exporting.gguf import SMALLEST_GATE, write_gguf
from moe_edge.exporting.gguf_layout import LAYOUTS, TENSOR_NAMES, class_of, gguf_name
from moe_edge.exporting.gguf_quantize import quantize_gguf
from moe_edge.exporting.gguf_reorder import interleave_rope
from moe_edge.exporting.parity import LIMITS
from moe_edge.metrics.quality import kl_per_token
from moe_edge.runtimes import open_runtime
from moe_edge.runtimes.base import generate
from moe_edge.runtimes.gguf_header import check_gguf_header
from moe_edge.runtimes.llama_cpp import LlamaCppRuntime
from tests.exporting.gguf_models import REPRESENTABLE, YARN, reference_logits, representable, some_ids


def export(checkpoint: Path, **kwargs) -> Path:
    out = checkpoint.with_suffix(".gguf")
    write_gguf(checkpoint, out, name="tiny", **kwargs)
    return out


# llama.cpp normalises everything with the model's epsilon: the latent of deepseek2 and the keys of linear attention, too
EPSILONS = {"deepseek_v2": 2e-4, "deepseek_v3": 2e-4, "glm4_moe_lite": 2e-4, "qwen3_5_moe": 1e-3}


def assert_same_in_float32(checkpoint: Path, family: str) -> None:
    """Weights that float16 holds exactly, computed in float32 by both: what is left is the order of sums."""
    ids = some_ids(96)
    weights = {name: tensor.half().float() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    full = checkpoint.with_suffix(".f32.gguf")
    quantize_gguf(export(checkpoint), full, "F32", None, 1)
    with LlamaCppRuntime(full, threads=1, context_length=128, kv_float32=True) as runtime:
        assert np.abs(runtime.logits(ids) - reference_logits(checkpoint, ids)).max() <= EPSILONS.get(family, 2e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", REPRESENTABLE)
def test_logits_and_greedy_tokens_equal_transformers(tmp_path, family, tied):
    checkpoint, ids = representable(tmp_path, family, tied=tied), some_ids()
    expected = reference_logits(checkpoint, ids)
    with LlamaCppRuntime(export(checkpoint), threads=1, context_length=128, kv_float32=True) as runtime:
        actual = runtime.logits(ids)
        tokens = generate(runtime, ids[:16], 8)
    assert actual.shape == expected.shape
    tolerance = 2e-2 if family == "qwen3_5_moe" else 7e-3  # activations in float16, there through a recurrence
    assert np.quantile(np.abs(actual - expected), 0.99) <= tolerance
    with open_runtime("hf", checkpoint, threads=1, context_length=128) as student:
        assert tokens == generate(student, ids[:16], 8)


@pytest.mark.parametrize("family", REPRESENTABLE)
def test_in_float32_the_graph_is_the_same_function(tmp_path, family):
    assert_same_in_float32(representable(tmp_path, family), family)


@pytest.mark.parametrize(
    ("family", "stored"),
    [
        ("qwen2_moe", True),
        ("olmoe", True),
        ("gpt_oss", True),
        ("qwen3_moe", False),
        ("mixtral", False),
        ("granitemoe", False),
        ("ernie4_5_moe", False),
        ("deepseek_v2", False),
        ("deepseek_v3", False),
        ("glm4_moe", False),
        ("glm4_moe_lite", False),
        ("lfm2_moe", False),
        ("minimax_m2", True),
        ("hunyuan_v1_moe", False),
        ("qwen3_5_moe", False),
    ],
)
def test_a_tied_head_is_stored_only_where_the_architecture_demands_it(tmp_path, family, stored):
    checkpoint = representable(tmp_path, family, tied=True)
    assert ("output.weight" in check_gguf_header(export(checkpoint)).tensors) == stored
    assert capability("llama_cpp", family).tied_head != stored


def test_metadata_says_what_the_model_is(tmp_path):
    out = export(
        representable(tmp_path, "qwen3_moe"), provenance={"base_model": "T", "criterion": "reap", "license": "x"}
    )
    metadata = check_gguf_header(out).metadata
    assert metadata["general.name"] == "tiny"
    assert metadata["general.base_model.0.name"] == "T"
    assert metadata["moe_edge.criterion"] == "reap"
    assert metadata["general.license"] == "x"
    assert metadata["qwen3moe.expert_count"] == 6
    assert metadata["qwen3moe.expert_used_count"] == 2
    assert metadata["qwen3moe.expert_gating_func"] == 1
    assert metadata["qwen3moe.expert_feed_forward_length"] == 32
    assert metadata["qwen3moe.attention.key_length"] == 32
    assert metadata["qwen3moe.context_length"] == 256


METADATA = {
    "granitemoe": {
        "granitemoe.embedding_scale": 2.0, "granitemoe.attention.scale": 0.2, "granitemoe.residual_scale": 0.7,
        "granitemoe.logit_scale": 1.5, "granitemoe.feed_forward_length": 32, "granitemoe.expert_gating_func": 1,
    },
    "ernie4_5_moe": {
        "ernie4_5-moe.leading_dense_block_count": 1, "ernie4_5-moe.interleave_moe_layer_step": 1,
        "ernie4_5-moe.feed_forward_length": 64, "ernie4_5-moe.expert_feed_forward_length": 32,
        "ernie4_5-moe.expert_shared_feed_forward_length": 64, "ernie4_5-moe.expert_gating_func": 1,
    },
    "gpt_oss": {
        "gpt-oss.attention.sliding_window": 8, "gpt-oss.expert_feed_forward_length": 32, "gpt-oss.rope.scaling.type": "yarn",
        "gpt-oss.rope.scaling.factor": 4.0, "gpt-oss.rope.scaling.original_context_length": 64,
        "gpt-oss.expert_gating_func": 1,
    },
    "deepseek_v2": {
        "deepseek2.attention.q_lora_rank": 0, "deepseek2.attention.kv_lora_rank": 32, "deepseek2.attention.key_length": 48,
        "deepseek2.attention.value_length": 32, "deepseek2.attention.key_length_mla": 24,
        "deepseek2.attention.value_length_mla": 24, "deepseek2.attention.head_count_kv": 1,
        "deepseek2.rope.dimension_count": 16, "deepseek2.expert_gating_func": 1, "deepseek2.expert_weights_norm": False,
        "deepseek2.expert_weights_scale": 1.7, "deepseek2.expert_shared_count": 2, "deepseek2.leading_dense_block_count": 1,
    },
    "deepseek_v3": {
        "deepseek2.attention.q_lora_rank": 24, "deepseek2.expert_gating_func": 2, "deepseek2.expert_weights_norm": True,
        "deepseek2.expert_group_count": 2, "deepseek2.expert_group_used_count": 1,
    },
    "glm4_moe": {
        "glm4moe.rope.dimension_count": 8, "glm4moe.expert_gating_func": 2, "glm4moe.expert_shared_count": 1,
        "glm4moe.expert_weights_scale": 1.7, "glm4moe.leading_dense_block_count": 1,
    },
    "lfm2_moe": {
        "lfm2moe.attention.head_count_kv": [0, 2], "lfm2moe.shortconv.l_cache": 3, "lfm2moe.expert_gating_func": 2,
        "lfm2moe.leading_dense_block_count": 1, "lfm2moe.expert_feed_forward_length": 32,
    },
    "minimax_m2": {"minimax-m2.rope.dimension_count": 16, "minimax-m2.expert_gating_func": 2},
    "hunyuan_v1_moe": {"hunyuan-moe.expert_shared_feed_forward_length": 32, "hunyuan-moe.expert_gating_func": 1},
    "qwen3_5_moe": {
        "qwen35moe.ssm.conv_kernel": 4, "qwen35moe.ssm.state_size": 16, "qwen35moe.ssm.group_count": 2,
        "qwen35moe.ssm.time_step_rank": 4, "qwen35moe.ssm.inner_size": 64, "qwen35moe.rope.dimension_count": 8,
        "qwen35moe.attention.recurrent_layers": [True, False], "qwen35moe.rope.dimension_sections": [2, 1, 1, 0],
    },
}  # fmt: skip


@pytest.mark.parametrize("family", METADATA)
def test_metadata_has_what_a_graph_needs_beside_the_sizes(tmp_path, family):
    metadata = check_gguf_header(export(representable(tmp_path, family))).metadata
    for key, value in METADATA[family].items():
        assert metadata[key] == (pytest.approx(value) if isinstance(value, float) else value), key


DEEPSEEK_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
VARIANTS = [
    ("deepseek_v2", {"rope_parameters": DEEPSEEK_YARN}),  # of V2-Lite; V3 has 1.0
    ("deepseek_v3", {"rope_parameters": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    ("deepseek_v3", {"rope_interleave": False}),  # rotates halves, llama.cpp pairs
    ("deepseek_v3", {"q_lora_rank": None, "norm_topk_prob": False}),
    ("deepseek_v3", {"n_group": 2, "topk_group": 2}),  # all groups are searched, which llama.cpp cannot say
    ("deepseek_v2", {"layers": 27, "width": 8, "hidden": 32}),  # counts that llama.cpp knows as V2-Lite
    ("glm4_moe", {"use_qk_norm": False, "attention_bias": False, "n_shared_experts": 2}),
    ("lfm2_moe", {"layers": 4, "num_dense_layers": 2}),
    ("hunyuan_v1_moe", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 100.0, "factor": 1.0}}),
    ("qwen3_5_moe", {"layers": 4, "linear_num_value_heads": 2}),  # one value head per key head
    ("qwen3_5_moe", {"linear_num_value_heads": 6}),  # three
]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_variants_of_a_family_equal_transformers(tmp_path, family, overrides):
    """Rows longer than yarn's original context, so that its scale of attention matters."""
    assert_same_in_float32(representable(tmp_path, family, **overrides), family)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "ernie4_5_moe"])
def test_norms_routers_biases_and_sinks_are_float32_and_weights_float16(tmp_path, family):
    for tensor in check_gguf_header(export(representable(tmp_path, family))).tensors.values():
        assert tensor.kind == ("F32" if class_of(tensor.name) in ALWAYS_F32 else "F16"), tensor.name
        assert tensor.kind == "F32" or not tensor.name.endswith((".bias", "sinks.weight", "norm.weight"))


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path):
    checkpoint = representable(tmp_path, "qwen3_moe")
    first = export(checkpoint).read_bytes()
    assert export(checkpoint).read_bytes() == first
    assert not list(tmp_path.glob("*.tmp"))


def test_bfloat16_checkpoints_are_exported(tmp_path):
    checkpoint, ids = representable(tmp_path, "qwen3_moe", dtype=torch.bfloat16), some_ids()
    with LlamaCppRuntime(export(checkpoint), threads=1, context_length=64, kv_float32=True) as runtime:
        assert np.quantile(np.abs(runtime.logits(ids) - reference_logits(checkpoint, ids)), 0.99) <= 5e-3


def test_a_zero_shared_gate_does_not_become_nan(tmp_path):
    """llama.cpp divides by the gate's logit."""
    checkpoint, ids = representable(tmp_path, "qwen2_moe"), some_ids()
    weights = load_file(checkpoint / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("shared_expert_gate.weight"):
            tensor.zero_()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with LlamaCppRuntime(export(checkpoint), threads=1, context_length=64, kv_float32=True) as runtime:
        actual = runtime.logits(ids)
    assert SMALLEST_GATE > 0
    assert np.quantile(np.abs(actual - reference_logits(checkpoint, ids)), 0.99) <= 5e-3


REFUSED = [
    ("qwen3_moe", {"norm_topk_prob": False}, "renormalise"),
    ("qwen2_moe", {"norm_topk_prob": True}, "renormalise"),
    ("olmoe", {"clip_qkv": 4.0}, "clip_qkv"),
    ("olmoe", {"num_key_value_heads": 2}, "key-value heads"),
    ("mixtral", {"sliding_window": 16}, "sliding window"),
    ("granitemoe", {"rope_parameters": YARN}, "scaled rotary"),
    ("ernie4_5_moe", {"layers": 4, "moe_layer_interval": 2}, "to be the first ones"),
    ("gpt_oss", {"swiglu_limit": 1.5}, "clamps"),
    ("gpt_oss", {"attention_bias": False}, "needs a bias on the attention's output"),
    ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("gpt_oss", {"rope_parameters": YARN | {"truncate": False}}, "rounds yarn's range"),
    ("gpt_oss", {"rope_parameters": YARN | {"attention_factor": 1.0}}, "attention_factor"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "scores a group of experts by top2_sum"),
    ("deepseek_v3", {"rope_parameters": YARN}, "mscale_all_dim, which must equal mscale"),
    ("deepseek_v3", {"rope_parameters": DEEPSEEK_YARN | {"mscale": 1.0}}, "mscale_all_dim, which must equal mscale"),
    ("deepseek_v3", {"layers": 26, "width": 8, "hidden": 32}, "one whose q has no latent"),
    ("deepseek_v3", {"n_shared_experts": 0}, "needs a shared expert"),
    ("glm4_moe_lite", {"layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]}, "to be the first ones"),
    ("lfm2_moe", {"routed_scaling_factor": 1.7}, "a factor on the routed experts"),
    ("lfm2_moe", {"norm_topk_prob": False}, "renormalise"),
    ("hunyuan_v1_moe", {"attention_bias": True}, "a bias on the attention's output"),
    ("qwen3_5_moe", {"linear_value_head_dim": 32}, "equally wide"),
    ("lfm2_moe", {"use_expert_bias": False}, "needs a bias that only selects experts"),
    ("gpt_oss", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "of type yarn only"),
]


@pytest.mark.parametrize(("family", "overrides", "reason"), REFUSED)
def test_a_model_that_llama_cpp_would_compute_differently_is_refused(tmp_path, family, overrides, reason):
    checkpoint = representable(tmp_path, family, **overrides)
    with pytest.raises(InputRejected, match=reason):
        export(checkpoint)
    assert not checkpoint.with_suffix(".gguf").exists()


def test_the_yarn_range_of_real_gpt_oss_is_rounded_harmlessly(tmp_path):
    """llama.cpp rounds 8.1..17.4 to 8..18: a small drift that parity admits, unlike that of the refused tiny one."""
    rope = YARN | {"rope_theta": 150000.0, "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
    sizes = {"head_dim": 64, "max_position_embeddings": 131072}
    checkpoint, ids = representable(tmp_path, "gpt_oss", rope_parameters=rope, **sizes), some_ids(150)
    with LlamaCppRuntime(export(checkpoint), threads=1, context_length=256, kv_float32=True) as runtime:
        kl_S = kl_per_token(reference_logits(checkpoint, ids), runtime.logits(ids))
    assert np.median(kl_S) < LIMITS["gguf F16"].median_kl_nats / 10


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "not finite"), (1e6, "65504")])
def test_a_weight_beyond_float16_is_refused(tmp_path, value, reason):
    checkpoint = representable(tmp_path, "mixtral")
    weights = load_file(checkpoint / "model.safetensors")
    next(tensor for name, tensor in weights.items() if "o_proj" in name)[0, 0] = value
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputRejected, match=reason):
        export(checkpoint)


def test_a_missing_folder_is_a_usage_error(tmp_path):
    with pytest.raises(ConfigError):
        export(tmp_path / "nowhere")


def test_names_and_classes_are_inverse():
    for tensor_class, part in TENSOR_NAMES:
        for family in LAYOUTS:
            assert class_of(gguf_name(tensor_class, part, 7, family)) == tensor_class
    with pytest.raises(InputRejected, match=r"blk\.0\.unknown"):
        class_of("blk.0.unknown.weight")


def test_rope_rows_become_neighbours():
    assert interleave_rope(np.arange(8)[:, None], heads=2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_an_entry_of_a_fused_checkpoint_is_exported(tmp_path):
    """Checkpoints may hold gate and up fused; the file is the same."""
    checkpoint = representable(tmp_path, "qwen3_moe", layers=1)
    expected = export(checkpoint).read_bytes()
    weights = load_file(checkpoint / "model.safetensors")
    experts = "model.layers.0.mlp.experts."

    def stacked(part: str) -> torch.Tensor:
        return torch.stack([weights.pop(f"{experts}{e}.{part}.weight") for e in range(6)])

    fused = torch.cat([stacked("gate_proj"), stacked("up_proj")], dim=1)
    weights |= {experts + "gate_up_proj": fused, experts + "down_proj": stacked("down_proj")}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert export(checkpoint).read_bytes() == expected
