"""MXFP4 experts are read as the numbers that transformers unpacks, through every reader, and what does not fit is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_edge.contracts.errors import InputRejected
from moe_edge.storage.checkpoint import TensorReader, checkpoint_digest, inspect_checkpoint
from moe_edge.storage.mxfp4 import dequantize
from moe_edge.storage.tensor_files import PieceReader
from tests.mxfp4 import released_gpt_oss

NAME = "model.layers.0.mlp.experts.gate_up_proj"


def test_every_byte_and_exponent_is_unpacked_as_transformers_does() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 256, 5, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 256, (3, 256, 5), dtype=torch.uint8, generator=generator)
    assert blocks.unique().numel() == scales.unique().numel() == 256
    found, expected = dequantize(blocks, scales), convert_moe_packed_tensors(blocks, scales)
    assert found.dtype == torch.bfloat16 and found.is_contiguous()
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))  # signs of zeros and infinities, too


def test_headers_describe_the_plain_model_and_both_readers_give_its_numbers(tmp_path: Path) -> None:
    packed, plain = released_gpt_oss(tmp_path)
    headers, expected = inspect_checkpoint(packed), inspect_checkpoint(plain)
    assert headers.packed and not expected.packed
    assert headers.config == expected.config and headers.total_bytes == expected.total_bytes
    assert {name: (info.dtype, info.shape, info.bytes) for name, info in headers.tensors.items()} == {
        name: (info.dtype, info.shape, info.bytes) for name, info in expected.tensors.items()
    }
    weights, reader = load_file(plain / "model.safetensors"), TensorReader(packed)
    with PieceReader(headers) as pieces:
        for name, tensor in weights.items():
            assert torch.equal(reader.get(name), tensor) and torch.equal(pieces.rows(name), tensor), name
            assert torch.equal(torch.cat([rows for _, rows in pieces.pieces(name, 1)]), tensor), name
        assert torch.equal(pieces.rows(NAME, 2, 4), weights[NAME][2:4])
    assert checkpoint_digest(packed) != checkpoint_digest(plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{NAME}_scales"), "blocks without scales"),
        (lambda t: t.pop(f"{NAME}_blocks"), "scales without blocks"),
        (lambda t: t.update({NAME: torch.zeros(1)}), "is there as well"),
        (
            lambda t: t.update({f"{NAME}_scales": t[f"{NAME}_scales"][:, :-1].contiguous()}),
            r"expected U8 \[E, R, G, 16\]",
        ),
        (
            lambda t: t.update({f"{NAME}_blocks": t[f"{NAME}_blocks"][..., :8].contiguous()}),
            r"expected U8 \[E, R, G, 16\]",
        ),
        (lambda t: t.update({f"{NAME}_scales": t[f"{NAME}_scales"].to(torch.int8)}), "scales I8"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(tmp_path: Path, change, words: str) -> None:
    packed, _ = released_gpt_oss(tmp_path)
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(InputRejected, match=words):
        inspect_checkpoint(packed)


@pytest.mark.parametrize("told", [{"quant_method": "fp8"}, {"quant_method": None}, "mxfp4"])
def test_another_quantization_is_not_unpacked(tmp_path: Path, told: object) -> None:
    packed, _ = released_gpt_oss(tmp_path)
    config = json.loads((packed / "config.json").read_text()) | {"quantization_config": told}
    (packed / "config.json").write_text(json.dumps(config))
    headers = inspect_checkpoint(packed)
    assert not headers.packed and "quantization_config" in headers.config
