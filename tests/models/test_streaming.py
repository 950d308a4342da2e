"""A model read part by part has the weights, the buffers and the results of the model loaded whole."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_edge.contracts.errors import InputRejected
from moe_edge.models.loading import load_model
from moe_edge.models.streaming import Part, StreamedModel
from moe_edge.models.taps import body, head
from moe_edge.models.views import expert_outputs, moe_layers
from tests.tiny import ALL_FAMILIES, tiny_checkpoint, tiny_ids, tiny_model

DTYPES = [torch.float32, torch.bfloat16]


def _parts(streamed: StreamedModel) -> list[Part]:
    return ["embedding", *range(len(streamed.layers)), "head", "rest"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_parts_hold_what_from_pretrained_loads(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, family, with_tokenizer=False, layers=4, dtype=torch.bfloat16)
    whole, streamed = load_model(folder, dtype), StreamedModel(folder, dtype)
    seen = set()
    for part in _parts(streamed):
        with streamed.loaded(part):
            for name, values in streamed.model.state_dict(keep_vars=True).items():
                if not values.is_meta:
                    seen.add(name)
                    expected = whole.state_dict()[name]
                    assert values.dtype == expected.dtype and torch.equal(values, expected), name
    assert seen == set(whole.state_dict())
    buffers = dict(whole.named_non_persistent_buffers())
    for name, values in streamed.model.named_non_persistent_buffers():
        assert torch.equal(values, buffers[name]), name


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_steps_give_the_models_own_results(family: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, family, with_tokenizer=False, layers=4, tied=family == "qwen3_moe")
    whole, streamed, ids = load_model(folder), StreamedModel(folder), tiny_ids(20, 2)
    with torch.inference_mode():
        with streamed.loaded("embedding"):
            hidden = streamed.embed(ids)
        for layer in range(4):
            with streamed.loaded(layer):
                hidden = streamed.step(layer, ids, hidden)
        found = streamed.finish(ids, hidden)
        assert torch.equal(found, body(whole)(input_ids=ids, use_cache=False).last_hidden_state)
        with streamed.loaded("head"):
            assert torch.equal(head(streamed.model)(found), head(whole)(found))
    streamed.close()


def test_only_the_loaded_part_takes_memory(tmp_path: Path) -> None:
    streamed = StreamedModel(tiny_checkpoint(tmp_path, "mixtral", with_tokenizer=False))
    with streamed.loaded(1):
        held = [name for name, values in streamed.model.named_parameters() if not values.is_meta]
        assert all(name.startswith("model.layers.1.") or name == "model.norm.weight" for name in held)
        held_bytes = sum(values.nbytes for values in streamed.layers[1].parameters())
        assert (
            held_bytes
            == streamed.part_bytes(1)
            == sum(values.nbytes for values in tiny_model("mixtral").model.layers[1].parameters())
        )
    assert all(values.is_meta for values in streamed.layers[1].parameters())


def test_compact_experts_take_their_stored_bytes_and_compute_the_same(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "gpt_oss", with_tokenizer=False, dtype=torch.bfloat16)
    plain, compact = StreamedModel(folder), StreamedModel(folder, compact=True)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for streamed in (plain, compact):
        with streamed.loaded(1):
            view = moe_layers(streamed.model)[1]
            outputs.append(expert_outputs(view, hidden))
            stacked = [tensor.dtype for tensor in view.experts.parameters() if tensor.ndim == 3]
            assert stacked == [torch.bfloat16 if streamed is compact else torch.float32] * 2
            assert view.router_weight.tensor.dtype == torch.float32
    assert torch.equal(*outputs)
    experts = sum(tensor.numel() for tensor in view.experts.parameters() if tensor.ndim == 3)
    assert plain.part_bytes(1) - compact.part_bytes(1) == 2 * experts


def test_fused_checkpoints_are_read_too(tmp_path: Path) -> None:
    """In-memory names of transformers 5, where gate and up of all experts lie in one tensor."""
    folder = tiny_checkpoint(tmp_path, "qwen3_moe", with_tokenizer=False)
    model = load_model(folder)
    save_file(
        {name: values.clone() for name, values in model.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    streamed = StreamedModel(folder)
    with streamed.loaded(0):
        for name, values in streamed.layers[0].named_parameters():
            assert torch.equal(values, model.model.layers[0].get_parameter(name))


def test_a_tensor_that_contradicts_the_config_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "olmoe", with_tokenizer=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(InputRejected):
        StreamedModel(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputRejected):
        StreamedModel(folder)
