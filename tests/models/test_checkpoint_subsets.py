"""Pruning a checkpoint on disk gives the checkpoint that pruning the loaded model and saving it gives; its first layers are a
checkpoint that computes what the whole model has behind those layers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_edge.contracts.errors import ConfigError
from moe_edge.models.checkpoint_subsets import (
    cut_config,
    layers_within,
    stream_pruned_checkpoint,
    write_first_layers,
)
from moe_edge.models.loading import load_model, save_student, stored_dtype
from moe_edge.models.pruning import prune
from moe_edge.models.taps import body, decoder_layers, head
from moe_edge.models.views import moe_layers
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.folders import hash_folder
from tests.tiny import ALL_FAMILIES, tiny_checkpoint, tiny_ids


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def _choice(model: torch.nn.Module, count: int = 4) -> dict[int, list[int]]:
    """Another choice in every layer; equally many of each group of experts."""
    kept = {}
    for view in moe_layers(model):
        groups = view.groups[0]
        size, share = view.count // groups, count // groups
        ids = [group * size + (place + view.position) % size for group in range(groups) for place in range(share)]
        kept[view.index] = sorted(ids)
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_it_writes_what_prune_and_save_write(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path, family, layers=3, dtype=dtype)
    model = load_model(teacher, stored_dtype(inspect_checkpoint(teacher)))
    kept = _choice(model)
    stream_pruned_checkpoint(teacher, kept, None, tmp_path / "streamed")
    prune(model, kept)
    save_student(model, teacher, tmp_path / "saved")
    found, expected = _tensors(tmp_path / "streamed"), _tensors(tmp_path / "saved")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype  # as stored; a loaded model keeps a few in float32
        assert torch.equal(found[name].to(tensor.dtype), tensor), name
    others = {path.name for path in (tmp_path / "saved").iterdir() if path.suffix != ".safetensors"}
    assert others == {path.name for path in (tmp_path / "streamed").iterdir() if path.suffix != ".safetensors"}
    for name in others:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name
    ids = tiny_ids(16)
    with torch.inference_mode():
        assert torch.equal(
            load_model(tmp_path / "streamed", dtype)(ids).logits, load_model(tmp_path / "saved", dtype)(ids).logits
        )


def test_shards_top_k_and_bytes_are_as_asked(tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path, "mixtral")
    for name in "ab":
        stream_pruned_checkpoint(teacher, {0: [0, 5], 1: [1, 2]}, 1, tmp_path / name, shard_bytes=100_000)
    assert hash_folder(tmp_path / "a") == hash_folder(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["num_experts_per_tok"] == 1 and config["num_local_experts"] == 2
    model = load_model(teacher)
    prune(model, {0: [0, 5], 1: [1, 2]}, 1)
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "a")(tiny_ids()).logits, model(tiny_ids()).logits)


def test_fused_checkpoints_stay_fused(tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe", with_tokenizer=False)
    model = load_model(teacher)
    tensors = {name: values.clone() for name, values in model.state_dict().items()}
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    stream_pruned_checkpoint(teacher, {0: [1, 3], 1: [0, 5]}, None, tmp_path / "out")
    prune(model, {0: [1, 3], 1: [0, 5]})
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in _tensors(tmp_path / "out").items())
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "out")(tiny_ids()).logits, model(tiny_ids()).logits)


def test_keeping_all_copies_every_number(tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path, "olmoe", dtype=torch.bfloat16)
    stream_pruned_checkpoint(teacher, {}, None, tmp_path / "out")
    before, after = _tensors(teacher), _tensors(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_impossible_choice_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path, "olmoe")
    for kept, top_k in (({0: [0, 1], 1: [1]}, 1), ({0: [9]}, None), ({0: [0], 1: [1]}, None)):
        with pytest.raises(ConfigError):
            stream_pruned_checkpoint(teacher, kept, top_k, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ALL_FAMILIES)
@torch.no_grad()
def test_the_first_layers_compute_what_lies_behind_them(family: str, tmp_path: Path) -> None:
    source, ids = tiny_checkpoint(tmp_path, family, layers=4, tied=family == "qwen3_moe"), tiny_ids(12, 1)
    write_first_layers(source, 3, tmp_path / "first")
    cut, whole, behind = load_model(tmp_path / "first"), load_model(source), []
    decoder_layers(whole)[2].register_forward_hook(
        lambda _, __, out: behind.append(out[0] if isinstance(out, tuple) else out)
    )
    whole(ids)
    expected = head(whole)(body(whole).get_submodule(norm_of(whole))(behind[0]))
    torch.testing.assert_close(cut(ids).logits, expected, rtol=0, atol=1e-5)
    assert len(decoder_layers(cut)) == 3 and (tmp_path / "first" / "tokenizer.json").is_file()


def norm_of(model: torch.nn.Module) -> str:
    """The last norm's name in the body."""
    names = dict(body(model).named_children())
    return next(name for name in ("norm", "final_layernorm", "embedding_norm") if name in names)


def test_as_many_layers_are_chosen_as_have_room(tmp_path: Path) -> None:
    headers = inspect_checkpoint(tiny_checkpoint(tmp_path, "mixtral", layers=3))
    total = sum(torch.Size(info.shape).numel() for info in headers.tensors.values())
    layer = sum(torch.Size(i.shape).numel() for name, i in headers.tensors.items() if ".layers.2." in name)
    assert [layers_within(headers, total - count * layer) for count in (0, 1, 2, 3)] == [3, 2, 1, 0]
    assert layers_within(headers, total - layer - 1) == 1 and layers_within(headers, 0) == 0


def test_lists_by_layer_are_cut_and_others_are_not() -> None:
    config = json.loads(
        '{"num_hidden_layers": 3, "layer_types": ["a", "b", "a"], "eos_token_id": [1, 2, 3], "x": [1, 2]}'
    )
    cut = cut_config(config | {"moe_layer_end_index": 2}, 2)
    assert cut["layer_types"] == ["a", "b"] and cut["eos_token_id"] == [1, 2, 3] and cut["x"] == [1, 2]
    assert (cut["num_hidden_layers"], cut["moe_layer_end_index"]) == (2, 1)
    assert cut_config(config | {"moe_layer_end_index": -1}, 2)["moe_layer_end_index"] == -1
