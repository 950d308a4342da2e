"""The neutral tensor map: complete, shape-checked, and with the numbers that the loaded model computes with."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.spec import TensorEntry
from moe_edge.families import family_of
from moe_edge.models.loading import load_model
from moe_edge.models.students import describe_model
from moe_edge.models.views import moe_layers
from moe_edge.models.weight_sources import assemble
from moe_edge.storage.checkpoint import TensorReader, inspect_checkpoint
from tests.tiny import FAMILY_NAMES, tiny_checkpoint, tiny_model


def entries_of(headers: CheckpointHeaders) -> list[TensorEntry]:
    return family_of(headers.config).tensors(headers.config, headers.tensors)


def fused_checkpoint(tmp_path: Path, family: str) -> Path:
    """A checkpoint with the fused names of transformers 5, beside the usual one."""
    folder = tiny_checkpoint(tmp_path, family, with_tokenizer=False, name="fused")
    tiny_model(family).save_pretrained(folder, save_original_format=False)
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_map_covers_every_tensor_and_parameter(tmp_path: Path, family: str, tied: bool) -> None:
    folder = tiny_checkpoint(tmp_path, family, with_tokenizer=False, tied=tied)
    headers = inspect_checkpoint(folder, require_tokenizer=False)
    entries = entries_of(headers)
    assert {name for entry in entries for name in entry.sources} == set(headers.tensors)
    classes = Counter(entry.tensor_class for entry in entries)
    assert classes["head"] == (0 if tied else 1)
    assert classes["router"] == classes["expert_down"] == 2
    assert classes["attention_bias"] == (6 if family == "qwen2_moe" else 0)
    assert classes["shared_router"] == (2 if family == "qwen2_moe" else 0)
    assert len({(entry.tensor_class, entry.layer, entry.part) for entry in entries}) == len(entries)
    summary = describe_model(headers)
    assert summary["params_total"] == sum(parameter.numel() for parameter in load_model(folder).parameters())
    assert summary["bytes"] == 4 * summary["params_total"] == headers.total_bytes
    assert summary["params_routed"] == 2 * 6 * 3 * 64 * 32
    assert summary["params_active"] == summary["params_total"] - 2 * 4 * 3 * 64 * 32
    assert (summary["experts"], summary["top_k"], summary["layers"], summary["family"]) == (6, 2, 2, family)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_assembled_experts_are_the_models(tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoint(tmp_path, family, with_tokenizer=False)
    reader, views = TensorReader(folder), moe_layers(load_model(folder))
    for entry in entries_of(reader.headers):
        tensor = assemble(entry, reader)
        assert tuple(tensor.shape) == entry.shape
        if entry.layer is None:
            continue
        view = views[entry.layer]
        expected = {
            "expert_gate": view.experts.gate_up_proj[:, :32],
            "expert_up": view.experts.gate_up_proj[:, 32:],
            "expert_down": view.experts.down_proj,
            "router": view.router.weight,
        }.get(entry.tensor_class)
        assert expected is None or torch.equal(tensor, expected)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_fused_checkpoints_give_the_same_tensors(tmp_path: Path, family: str) -> None:
    split = TensorReader(tiny_checkpoint(tmp_path, family, with_tokenizer=False))
    fused = TensorReader(fused_checkpoint(tmp_path, family))
    assert any(name.endswith("experts.gate_up_proj") for name in fused.names)
    for one, two in zip(entries_of(split.headers), entries_of(fused.headers), strict=True):
        assert (one.tensor_class, one.layer, one.part, one.shape) == (two.tensor_class, two.layer, two.part, two.shape)
        assert torch.equal(assemble(one, split), assemble(two, fused))
        assert len(two.sources) == 1
    assert describe_model(split.headers) == describe_model(fused.headers)


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> CheckpointHeaders:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("names"), "qwen3_moe", with_tokenizer=False)
    return inspect_checkpoint(folder, require_tokenizer=False)


def test_a_missing_tensor_is_named(headers: CheckpointHeaders) -> None:
    names = dict(headers.tensors)
    del names["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(InputRejected, match=r"lacks.*\n.*layers\.1\.mlp\.experts\.3\.up_proj"):
        family_of(headers.config).tensors(headers.config, names)


def test_an_empty_checkpoint_is_refused(headers: CheckpointHeaders) -> None:
    with pytest.raises(InputRejected, match="holds none"):
        family_of(headers.config).tensors(headers.config | {"num_hidden_layers": 10**4}, {})


def test_an_unknown_tensor_is_named(headers: CheckpointHeaders) -> None:
    with pytest.raises(InputRejected, match=r"unknown.*\n.*extra\.weight"):
        family_of(headers.config).tensors(headers.config, [*headers.tensors, "model.extra.weight"])


def test_leftovers_that_do_not_matter_are_ignored(headers: CheckpointHeaders) -> None:
    family = family_of(headers.config)
    names = [*headers.tensors, "model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert family.tensors(headers.config, names) == family.tensors(headers.config, headers.tensors)
    tied = family.tensors(headers.config | {"tie_word_embeddings": True}, list(headers.tensors))
    assert all(entry.tensor_class != "head" for entry in tied)


@pytest.mark.parametrize("change", [{"moe_intermediate_size": 33}, {"vocab_size": 255}, {"head_dim": 16}])
def test_a_config_that_contradicts_the_shapes(headers: CheckpointHeaders, change: dict[str, int]) -> None:
    with pytest.raises(InputRejected, match="contradicts config.json"):
        family_of(headers.config).tensors(headers.config | change, headers.tensors)


def test_fused_shapes_are_checked(tmp_path: Path) -> None:
    headers = inspect_checkpoint(fused_checkpoint(tmp_path, "olmoe"), require_tokenizer=False)
    with pytest.raises(InputRejected, match=r"\(6, 66, 64\), the file has \(6, 64, 64\)"):
        family_of(headers.config).tensors(headers.config | {"intermediate_size": 33}, headers.tensors)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 10**12}, {"num_experts": 10**12, "num_local_experts": 10**12}]
)
def test_absurd_counts_are_refused_at_once(headers: CheckpointHeaders, change: dict[str, int]) -> None:
    family = family_of(headers.config)
    for extra in ([], ["model.layers.0.mlp.experts.gate_up_proj"]):
        with pytest.raises(InputRejected, match="declares 1000000000000"):
            family.tensors(headers.config | change, [*headers.tensors, *extra])
