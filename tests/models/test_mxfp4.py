"""gpt-oss as it is released: loaded whole, streamed and pruned on disk it is the plain bfloat16 model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_edge.contracts.errors import InputRejected
from moe_edge.families import family_of
from moe_edge.models.checkpoint_subsets import stream_pruned_checkpoint
from moe_edge.models.loading import load_model, save_student, stored_dtype
from moe_edge.models.streaming import Part, StreamedModel
from moe_edge.models.students import describe_model
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.mxfp4 import released_gpt_oss
from tests.tiny import tiny_checkpoint, tiny_ids

DTYPES = [torch.float32, torch.bfloat16]


@torch.no_grad()
def plain_logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """By transformers alone."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(tiny_ids()).logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loaded_model_is_the_plain_one(tmp_path: Path, dtype: torch.dtype) -> None:
    packed, plain = released_gpt_oss(tmp_path)
    model = load_model(packed, dtype)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        name: tensor.dtype for name, tensor in load_model(plain, dtype).state_dict().items()
    }
    with torch.no_grad():
        assert torch.equal(model(tiny_ids()).logits, plain_logits(plain, dtype))


def test_it_is_described_in_weights_and_not_in_blocks(tmp_path: Path) -> None:
    packed, plain = (inspect_checkpoint(folder) for folder in released_gpt_oss(tmp_path))
    assert describe_model(packed) == describe_model(plain)
    assert describe_model(packed)["bytes"] == 2 * describe_model(packed)["params_total"]
    assert stored_dtype(packed) == torch.bfloat16


@pytest.mark.parametrize("compact", [False, True])
def test_every_streamed_part_is_that_of_the_plain_model(tmp_path: Path, compact: bool) -> None:
    packed, plain = released_gpt_oss(tmp_path)
    expected, seen = load_model(plain).state_dict(), set()
    with StreamedModel(packed, compact=compact) as streamed:
        parts: list[Part] = ["embedding", *range(len(streamed.layers)), "head", "rest"]
        for part in parts:
            with streamed.loaded(part):
                held = {name: value for name, value in streamed.model.state_dict().items() if not value.is_meta}
                assert all(torch.equal(value.float(), expected[name]) for name, value in held.items())
                seen |= held.keys()
    assert seen == expected.keys()


def test_what_is_saved_is_plain_bfloat16(tmp_path: Path) -> None:
    packed, plain = released_gpt_oss(tmp_path)
    save_student(load_model(packed, torch.bfloat16), packed, tmp_path / "saved")
    stream_pruned_checkpoint(packed, {}, None, tmp_path / "streamed")
    expected = load_file(plain / "model.safetensors")
    for name in ("saved", "streamed"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key].to(tensor.dtype), tensor) for key, tensor in expected.items())
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())
        assert torch.equal(plain_logits(tmp_path / name), plain_logits(plain))


def test_experts_are_dropped_from_it_on_disk(tmp_path: Path) -> None:
    packed, plain = released_gpt_oss(tmp_path)
    kept = {0: [0, 2, 3, 5], 1: [1, 2, 4, 5]}
    for source in (packed, plain):
        stream_pruned_checkpoint(source, kept, None, tmp_path / f"from-{source.name}")
    assert torch.equal(plain_logits(tmp_path / "from-packed"), plain_logits(tmp_path / "from-plain"))


def test_other_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen3_moe", with_tokenizer=False)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputRejected, match=r"MXFP4 is read, of gpt_oss"):
        load_model(folder)
    packed, _ = released_gpt_oss(tmp_path)
    config = json.loads((packed / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (packed / "config.json").write_text(json.dumps(config))
    headers = inspect_checkpoint(packed)
    with pytest.raises(InputRejected, match="quantized checkpoint"):
        family_of(headers.config).spec(headers.config)
