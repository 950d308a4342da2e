"""The tensor map and the spec of every family: complete, equal to what the loaded model computes with, and right about
released models.
"""

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from moe_edge.contracts.capabilities import CAPABILITIES, RUNTIME_OF_FORMAT, refusals
from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.quantization import ALWAYS_F32, RECIPES
from moe_edge.contracts.spec import EXPERT_SIZED, FEATURES, TensorEntry
from moe_edge.families import FAMILIES, family_of
from moe_edge.families.names import expected_entries
from moe_edge.models.loading import load_model, save_student
from moe_edge.models.pruning import prune
from moe_edge.models.students import count_params, describe_model
from moe_edge.models.views import moe_layers
from moe_edge.models.weight_sources import assemble
from moe_edge.models.weights import read_expert
from moe_edge.storage.checkpoint import TensorReader, inspect_checkpoint
from moe_edge.storage.files import read_json
from tests.tiny import ALL_FAMILIES, FAMILY_NAMES, tiny_checkpoint, tiny_config, tiny_ids, tiny_model

EXPERTS, LAYERS, WIDTH = 8, 3, 32
NEW_FAMILIES = [name for name in ALL_FAMILIES if name not in FAMILY_NAMES]


@pytest.fixture(scope="module", params=ALL_FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each family in turn, without tokenizer."""
    path = tmp_path_factory.mktemp(request.param)
    return tiny_checkpoint(path, request.param, with_tokenizer=False, experts=EXPERTS, layers=LAYERS)


def entries_of(folder: Path) -> list[TensorEntry]:
    headers = inspect_checkpoint(folder, require_tokenizer=False)
    return family_of(headers.config).tensors(headers.config, headers.tensors)


def edited(folder: Path, target: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A copy of a checkpoint with more tensors and other config keys."""
    target.mkdir()
    merged = load_file(folder / "model.safetensors") | tensors
    save_file(merged, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(read_json(folder / "config.json") | config))
    return target


def test_the_map_covers_every_tensor_once(folder: Path) -> None:
    entries, headers = entries_of(folder), inspect_checkpoint(folder, require_tokenizer=False)
    assert {name for entry in entries for name in entry.sources} == set(headers.tensors)
    assert len({(entry.tensor_class, entry.layer, entry.part) for entry in entries}) == len(entries)
    numbers = sum(prod(info.shape) for info in headers.tensors.values())
    assert sum(prod(entry.shape) for entry in entries) == numbers
    state = load_model(folder).state_dict()
    tied = headers.config.get("tie_word_embeddings", False)
    assert sum(t.numel() for name, t in state.items() if not (tied and name == "lm_head.weight")) == numbers
    summary = describe_model(headers)
    assert (summary["params_total"], summary["experts"], summary["top_k"]) == (numbers, EXPERTS, 2)


def test_every_class_has_a_place_in_a_file(folder: Path) -> None:
    for entry in entries_of(folder):
        assert entry.tensor_class in ALWAYS_F32 or entry.tensor_class in RECIPES["Q8_0"]


def test_expert_sized_tensors_have_the_experts_first(folder: Path) -> None:
    entries = entries_of(folder)
    assert all((entry.shape[0] == EXPERTS) == (entry.tensor_class in EXPERT_SIZED) for entry in entries)
    spec = family_of(read_json(folder / "config.json")).spec(read_json(folder / "config.json"))
    found = Counter(entry.tensor_class for entry in entries)
    layers = len(spec.moe_layers)
    assert found["router"] == found["expert_gate"] == layers
    assert found["router_bias"] == layers * spec.moe.router_bias
    assert found["selection_bias"] == layers * spec.moe.selection_bias
    assert found["expert_bias"] == 3 * layers * spec.moe.expert_biases
    assert found["shared_down"] == layers * bool(spec.moe.shared_width)
    assert found["dense_down"] == len(spec.dense_layers)


def test_assembled_tensors_are_the_models(folder: Path) -> None:
    reader, views = TensorReader(folder), {view.index: view for view in moe_layers(load_model(folder))}
    seen = 0
    for entry in entries_of(folder):
        tensor = assemble(entry, reader)
        assert tuple(tensor.shape) == entry.shape
        view = views.get(entry.layer)
        if view is None or entry.tensor_class not in EXPERT_SIZED:
            continue
        if entry.tensor_class.startswith("expert"):
            part = entry.part if entry.part != "weight" else entry.tensor_class.removeprefix("expert_")
            field = {"gate": "gate_FD", "up": "up_FD", "down": "down_DF"}.get(part) or f"{part}_F".replace(
                "down_bias_F", "down_bias_D"
            )
            expected = torch.stack([getattr(read_expert(view, expert), field) for expert in range(EXPERTS)])
        else:
            axes = {"router": view.router_weight.tensor, "router_bias": getattr(view.router, "bias", None)}
            expected = axes.get(entry.tensor_class, view.selection_bias and view.selection_bias.tensor.flatten())
        assert torch.equal(tensor, expected), entry
        seen += 1
    assert seen >= 4 * len(views)


def test_names_of_the_loaded_model_give_the_same_tensors(folder: Path, tmp_path: Path) -> None:
    load_model(folder).save_pretrained(tmp_path, save_original_format=False)
    saved, fused = TensorReader(folder), TensorReader(tmp_path)
    for one, two in zip(entries_of(folder), entries_of(tmp_path), strict=True):
        assert (one.tensor_class, one.layer, one.part, one.shape) == (two.tensor_class, two.layer, two.part, two.shape)
        assert torch.equal(assemble(one, saved), assemble(two, fused))
        assert len(two.sources) == 1


def test_an_unknown_or_a_missing_tensor_is_named(folder: Path) -> None:
    headers = inspect_checkpoint(folder, require_tokenizer=False)
    family = family_of(headers.config)
    with pytest.raises(InputRejected, match=r"unknown.*\n.*extra\.weight"):
        family.tensors(headers.config, [*headers.tensors, "model.layers.1.extra.weight"])
    for name in list(headers.tensors)[::7]:
        rest = {other: info for other, info in headers.tensors.items() if other != name}
        with pytest.raises(InputRejected, match="lacks tensors"):
            family.tensors(headers.config, rest)


def test_the_spec_alone_predicts_the_saved_names(folder: Path) -> None:
    config = read_json(folder / "config.json")
    family = family_of(config)
    expected = expected_entries(family, family.spec(config))
    assert [(entry.tensor_class, entry.layer, entry.sources) for entry in expected] == [
        (entry.tensor_class, entry.layer, entry.sources) for entry in entries_of(folder)
    ]


@pytest.mark.parametrize("name", NEW_FAMILIES)
def test_no_runtime_accepts_what_no_exporter_knows(name: str) -> None:
    config = tiny_model(name, layers=LAYERS).config.to_dict()
    spec = family_of(config).spec(config)
    assert spec.features <= set(FEATURES)
    for runtime in RUNTIME_OF_FORMAT.values():
        reasons, row = refusals(runtime, spec), CAPABILITIES.get((runtime, name))
        assert row is not None or reasons
        assert not row or bool(spec.features - row.computes) <= bool(reasons)


def test_phimoe_is_never_a_gguf() -> None:
    config = tiny_model("phimoe").config.to_dict()
    assert refusals("llama_cpp", family_of(config).spec(config)) == [
        "llama_cpp approximates the sparsemixer routing of phimoe by a renormalised softmax"
    ]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_plain_families_have_no_features(name: str) -> None:
    config = tiny_model(name).config.to_dict()
    assert not family_of(config).spec(config).features


# What makes the released models; the other keys have the defaults of their config class.
DEEPSEEK_V2_LITE = {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
    "num_attention_heads": 16, "q_lora_rank": None, "n_routed_experts": 64, "num_experts_per_tok": 6,
    "n_shared_experts": 2, "first_k_dense_replace": 1,
}  # fmt: skip
GPT_OSS_20B = {"num_hidden_layers": 24, "num_local_experts": 32}
LFM2_8B = {
    "num_hidden_layers": 24, "num_experts": 32,
    "layer_types": ["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)],
}  # fmt: skip
PHI_35_MOE = {"num_local_experts": 16, "attention_bias": True, "lm_head_bias": True}
GRANITE_1B = {
    "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 8, "vocab_size": 49155,
    "tie_word_embeddings": True,
}  # fmt: skip
GLM_45_AIR = {"n_routed_experts": 128, "attention_bias": True, "head_dim": 128}
HUNYUAN_A13B = {
    "hidden_size": 4096, "intermediate_size": 3072, "num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": 128,
    "num_experts": 64, "moe_topk": [8] * 32, "vocab_size": 128167, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "billions", "active_billions"),
    [
        ("deepseek_v2", DEEPSEEK_V2_LITE, 15.7, 2.7),
        ("deepseek_v3", {"n_routed_experts": 256}, 671.0, 37.6),
        ("gpt_oss", GPT_OSS_20B, 20.9, 4.2),
        ("gpt_oss", {"num_local_experts": 128}, 116.8, 5.7),
        ("ernie4_5_moe", {"moe_num_experts": 64}, 21.8, 3.4),
        ("lfm2_moe", LFM2_8B, 8.3, 1.6),
        ("phimoe", PHI_35_MOE, 41.9, 6.6),
        ("granitemoe", GRANITE_1B, 1.3, 0.4),
        ("glm4_moe", GLM_45_AIR, 106.9, 13.4),
        ("qwen3_5_moe", {"num_experts": 256}, 34.7, 3.5),
        ("minimax_m2", {"num_local_experts": 256}, 228.7, 11.0),
        ("hunyuan_v1_moe", HUNYUAN_A13B, 80.4, 12.7),
    ],
)
def test_released_models_have_their_published_size(
    name: str, config: dict[str, Any], billions: float, active_billions: float
) -> None:
    family = FAMILIES[name]
    spec = family.spec(config)
    counts = count_params(spec, expected_entries(family, spec))
    assert (round(counts.total / 1e9, 1), round(counts.active / 1e9, 1)) == (billions, active_billions)


@pytest.mark.parametrize("name", NEW_FAMILIES)
def test_a_sparse_config_means_what_transformers_takes_it_for(name: str) -> None:
    """An older config.json leaves keys out; lists of layer types are made up alike."""
    kind = "qwen3_5_moe_text" if name == "qwen3_5_moe" else name
    family = FAMILIES[name]
    sizes = {"num_hidden_layers": 8, family.expert_keys[0]: 16, family.top_k_keys[0]: family.fixed_top_k or 4}
    if name == "lfm2_moe":
        sizes["layer_types"] = ["conv", "full_attention"] * 4
    full = AutoConfig.for_model(kind, **sizes).to_dict()
    assert family.spec({"model_type": kind, **sizes}) == family.spec(full)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    kind = "qwen3_5_moe_text" if name == "qwen3_5_moe" else name
    defaults, theirs = dict(FAMILIES[name].defaults), type(AutoConfig.for_model(kind))
    assert defaults.pop("default_theta") == theirs.default_theta
    rope = AutoConfig.for_model(kind).rope_parameters
    share, scaled = defaults.pop("partial_rotary_factor", None), defaults.pop("default_rope", None)
    assert share in (None, rope.get("partial_rotary_factor")) and (scaled or {}).items() <= rope.items()
    for key, value in defaults.items():
        assert value == getattr(theirs, key), key


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("deepseek_v3", {"n_group": 3}, "do not divide into 3 groups"),
        ("deepseek_v3", {"topk_group": 5, "n_group": 4}, "5 groups are used of 4"),
        ("deepseek_v3", {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "exceeds the 2 experts of 1 groups"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 8}, "too few"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias"),
        ("deepseek_v3", {"first_k_dense_replace": 99}, "every layer is dense"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias"),
        ("lfm2_moe", {"conv_bias": True}, "conv_bias"),
        ("lfm2_moe", {"layer_types": None}, "missing"),
        ("lfm2_moe", {"layer_types": ["conv"]}, "layer_types"),
        ("lfm2_moe", {"layer_types": ["conv", "ring", "conv"]}, "ring"),
        ("hunyuan_v1_moe", {"moe_topk": [2, 3, 2]}, "one top-k for all layers"),
        ("phimoe", {"num_experts_per_tok": 1}, "computes 2 only"),
        ("gpt_oss", {"num_local_experts": None}, "expected one of num_local_experts"),
        ("qwen3_5_moe", {"attention_bias": True}, "attention_bias"),
        ("granitemoe", {"logits_scaling": "much"}, "wrong type"),
        ("glm4_moe", {"num_hidden_layers": 10**12}, "declares 1000000000000 layers"),
        ("ernie4_5_moe", {"num_hidden_layers": 10**12}, "declares 1000000000000 layers"),
    ],
)
def test_what_cannot_be_represented_is_refused(name: str, changes: dict[str, Any], word: str) -> None:
    base = tiny_config(name, EXPERTS, 2, LAYERS, 64, WIDTH, 256, False)
    FAMILIES[name].spec(base)
    with pytest.raises(InputRejected, match=word) as caught:
        FAMILIES[name].spec(base | changes)
    assert caught.value.exit_code == 4


def test_older_keys_are_understood() -> None:
    base = tiny_config("lfm2_moe", EXPERTS, 2, LAYERS, 64, WIDTH, 256, False)
    assert FAMILIES["lfm2_moe"].spec(base | {"tie_embedding": True}).tied_embeddings
    base = tiny_config("minimax_m2", EXPERTS, 2, LAYERS, 64, WIDTH, 256, False) | {"rope_parameters": None}
    assert FAMILIES["minimax_m2"].spec(base | {"rotary_dim": 8, "rope_theta": 1e4}).rotary_share == 0.25


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "deepseek_v3", experts=EXPERTS, layers=LAYERS)
    tensors = load_file(folder / "model.safetensors")
    extra = {n.replace("layers.2.", "layers.3."): t.clone() for n, t in tensors.items() if ".layers.2." in n}
    extra["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128)
    teacher = edited(folder, tmp_path / "mtp", extra, num_nextn_predict_layers=1)
    ids = tiny_ids()
    with torch.no_grad():
        model = load_model(teacher)
        assert torch.equal(model(ids).logits, load_model(folder)(ids).logits)
    save_student(model, folder, tmp_path / "student")
    assert read_json(tmp_path / "student" / "config.json")["num_nextn_predict_layers"] == 0
    assert load_file(tmp_path / "student" / "model.safetensors").keys() == tensors.keys()
    with pytest.raises(InputRejected, match="unknown tensors"):
        load_model(edited(folder, tmp_path / "none", extra))


@pytest.mark.parametrize("count", [10**12, -1, "many", True, 1.5])
def test_an_absurd_number_of_such_layers_is_refused_at_once(tmp_path: Path, count: object) -> None:
    folder = tiny_checkpoint(tmp_path, "deepseek_v3", experts=EXPERTS, layers=LAYERS)
    with pytest.raises(InputRejected, match="num_nextn_predict_layers"):
        load_model(edited(folder, tmp_path / "mtp", {}, num_nextn_predict_layers=count))


def test_the_language_model_of_a_model_that_sees(tmp_path: Path) -> None:
    text = tiny_config("qwen3_5_moe", EXPERTS, 2, LAYERS, 64, WIDTH, 256, False)
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    }
    torch.manual_seed(0)
    whole = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(text_config=text, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path / "saved")
    teacher = edited(tmp_path / "saved", tmp_path / "teacher", {"mtp.fc.weight": torch.zeros(4, 4)})
    config = read_json(teacher / "config.json")
    assert config["model_type"] == "qwen3_5_moe" and "num_experts" not in config
    sources = {source for entry in entries_of(teacher) for source in entry.sources}
    assert all(source == "lm_head.weight" or source.startswith("model.language_model.") for source in sources)
    model, ids = load_model(teacher), tiny_ids()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
        prune(model, {layer: [0, 3, 5] for layer in range(LAYERS)})
        save_student(model, teacher, tmp_path / "student")
        student = load_model(tmp_path / "student")
        assert torch.equal(student(ids).logits, model(ids).logits)
    assert read_json(tmp_path / "student" / "config.json")["num_experts"] == 3
    with pytest.raises(InputRejected, match="quantized"):
        family_of(config).spec(config | {"quantization_config": {}})
