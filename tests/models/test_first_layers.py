"""The first layers of a checkpoint are a checkpoint that computes what the whole model has behind those layers."""

import json
from pathlib import Path

import pytest
import torch

from moe_edge.models.checkpoint_subsets import cut_config, layers_within, write_first_layers
from moe_edge.models.loading import load_model
from moe_edge.models.taps import body, decoder_layers, head
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.tiny import ALL_FAMILIES, tiny_checkpoint, tiny_ids


@pytest.mark.parametrize("family", ALL_FAMILIES)
@torch.no_grad()
def test_it_computes_what_lies_behind_its_layers(family: str, tmp_path: Path) -> None:
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
