"""config.json -> ModelSpec: the numbers of real models, the defaults of transformers, and what is refused."""

from typing import Any

import pytest
from transformers import AutoConfig

from moe_edge.contracts.errors import InputRejected
from moe_edge.families import FAMILIES, family_of
from moe_edge.families.names import expected_entries
from moe_edge.models.students import count_params
from tests.tiny import FAMILY_NAMES, tiny_config

# The config.json of released models, as transformers 4 wrote them, with parameter counts from their model cards.
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
QWEN15_MOE = {
    "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632,
    "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe", "moe_intermediate_size": 1408,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
MIXTRAL_8X7B = {
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
OLMOE_1B_7B = {
    "attention_bias": False, "clip_qkv": None, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024,
    "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 50304,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "total", "active_billions"),
    [
        (QWEN3_30B_A3B, 30_532_122_624, 3.35),
        (QWEN15_MOE, 14_315_784_192, 2.69),
        (MIXTRAL_8X7B, 46_702_792_704, 12.88),
        (OLMOE_1B_7B, 6_919_161_856, 1.28),
    ],
)
def test_released_models_have_their_published_size(config: dict[str, Any], total: int, active_billions: float) -> None:
    family = family_of(config)
    spec = family.spec(config)
    counts = count_params(spec, expected_entries(family, spec))
    assert counts.total == total
    assert round(counts.active / 1e9, 2) == active_billions
    assert sum(counts.by_class.values()) == total


def test_qwen3_spec_in_full() -> None:
    spec = family_of(QWEN3_30B_A3B).spec(QWEN3_30B_A3B)
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim) == (48, 2048, 32, 4, 128)
    assert (spec.vocab, spec.context_length, spec.rms_eps, spec.rope_theta) == (151936, 40960, 1e-6, 1e6)
    assert (spec.qk_norm, spec.attention_bias, spec.tied_embeddings, spec.sliding_window) == (
        "per_head",
        False,
        False,
        None,
    )
    moe = spec.moe
    assert (moe.experts, moe.top_k, moe.expert_width, moe.renormalise, moe.shared_width) == (128, 8, 768, True, 0)


def test_what_sets_the_others_apart() -> None:
    qwen2 = family_of(QWEN15_MOE).spec(QWEN15_MOE)
    assert (qwen2.attention_bias, qwen2.moe.shared_width, qwen2.moe.shared_gated) == (True, 5632, True)
    assert (qwen2.moe.renormalise, qwen2.sliding_window, qwen2.qk_norm) == (False, None, "none")
    mixtral = family_of(MIXTRAL_8X7B).spec(MIXTRAL_8X7B | {"sliding_window": 4096, "head_dim": None})
    assert (mixtral.sliding_window, mixtral.head_dim, mixtral.moe.renormalise) == (4096, 128, True)
    olmoe = family_of(OLMOE_1B_7B).spec(OLMOE_1B_7B | {"clip_qkv": 8.0, "num_key_value_heads": None})
    assert (olmoe.clip_qkv, olmoe.qk_norm, olmoe.kv_heads, olmoe.moe.renormalise) == (8.0, "full_width", 16, False)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_sparse_config_means_what_transformers_takes_it_for(name: str) -> None:
    full = AutoConfig.for_model(name).to_dict()
    count = full.get("num_local_experts", full.get("num_experts"))
    assert FAMILIES[name].spec({"model_type": name, "num_experts": count}) == FAMILIES[name].spec(full)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_either_expert_key_is_read(name: str, key: str) -> None:
    assert FAMILIES[name].spec({key: 24}).moe.experts == 24


def test_rope_theta_from_either_place() -> None:
    new = {"num_experts": 8, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert FAMILIES["qwen3_moe"].spec(new).rope_theta == 5e5
    assert FAMILIES["qwen3_moe"].spec({"num_experts": 8, "rope_theta": 7e4}).rope_theta == 7e4
    assert FAMILIES["mixtral"].spec({"num_local_experts": 8}).rope_theta == 1e6


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias"),
        ("olmoe", {"attention_bias": True}, "attention_bias"),
        ("qwen2_moe", {"use_sliding_window": True}, "sliding window"),
        ("qwen2_moe", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding window"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act"),
        ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        ("olmoe", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
        ("qwen3_moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen3_moe", {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ("qwen3_moe", {"num_experts": 4}, "disagree|experts there are"),
        ("qwen3_moe", {"num_local_experts": None}, "experts there are"),
        ("qwen3_moe", {"num_local_experts": [8]}, "wrong type"),
        ("mixtral", {"num_local_experts": 0}, "number of experts is 0"),
        ("mixtral", {"num_local_experts": 1}, "top-k 2 exceeds the 1 experts"),
        ("mixtral", {"num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
        ("mixtral", {"num_hidden_layers": True}, "num_hidden_layers is True"),
        ("mixtral", {"hidden_size": "x"}, "wrong type"),
        ("mixtral", {"num_attention_heads": 0}, "wrong type"),
        ("mixtral", {"num_key_value_heads": 5}, "cannot share 5"),
        ("mixtral", {"rope_theta": "much"}, "wrong type"),
        ("mixtral", {"rope_parameters": [1]}, "wrong type"),
    ],
)
def test_what_cannot_be_represented_is_refused(name: str, changes: dict[str, Any], word: str) -> None:
    base = {"num_local_experts": 8}
    with pytest.raises(InputRejected, match=word) as caught:
        FAMILIES[name].spec(base | changes)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("kind", ["llama4_text", "deepseek_v9", None, 7, ["mixtral"]])
def test_an_unknown_family_is_refused_with_the_list(kind: object) -> None:
    with pytest.raises(InputRejected) as caught:
        family_of({"model_type": kind, "n_routed_experts": 8})
    assert caught.value.exit_code == 4
    assert "unknown model family" in str(caught.value)
    assert ", ".join(FAMILIES) in str(caught.value) and len(FAMILIES) == 17


def test_a_dense_model_is_called_dense() -> None:
    with pytest.raises(InputRejected, match="dense") as caught:
        family_of({"model_type": "llama", "hidden_size": 64})
    assert "qwen3_moe" in str(caught.value) and caught.value.exit_code == 4


def test_experts_inside_a_nested_config_are_not_called_dense() -> None:
    with pytest.raises(InputRejected, match="unknown model family"):
        family_of({"model_type": "qwen9_moe", "text_config": {"num_experts": 8}})


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_tiny_models_are_supported(name: str) -> None:
    config = AutoConfig.for_model(name, **tiny_config(name, 6, 2, 2, 64, 32, 256, True)).to_dict()
    spec = family_of(config).spec(config)
    assert (spec.moe.experts, spec.moe.top_k, spec.moe.expert_width, spec.tied_embeddings) == (6, 2, 32, True)
