"""Pruning a checkpoint on disk gives the checkpoint that pruning the loaded model and saving it gives."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_edge.contracts.errors import ConfigError
from moe_edge.models.checkpoint_subsets import stream_pruned_checkpoint
from moe_edge.models.loading import load_model, save_student, stored_dtype
from moe_edge.models.pruning import prune
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
