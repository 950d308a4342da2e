"""The blockwise quantizer: never worse than round-to-nearest, exact where it can be, packed as ONNX Runtime reads."""

import numpy as np
import pytest
import torch

from moe_edge.exporting.imatrix import Importance
from moe_edge.exporting.onnx_quantize import pack_codes, quantize

SHAPES = {
    "normal": lambda g: torch.randn(40, 128, generator=g) * 0.02,
    "heavy": lambda g: torch.randn(40, 128, generator=g) ** 3,
    "shifted": lambda g: torch.rand(40, 128, generator=g) + 5.0,
    "negative": lambda g: -torch.rand(40, 128, generator=g) * 1e-3,
    "sparse": lambda g: torch.randn(40, 128, generator=g) * (torch.rand(40, 128, generator=g) > 0.9),
    "zeros": lambda g: torch.zeros(40, 128),
    "tiny": lambda g: torch.randn(40, 128, generator=g) * 1e-9,
}


def block_errors(weight: torch.Tensor, scheme: str, bits: int, block: int, w: torch.Tensor | None) -> torch.Tensor:
    stored = quantize(weight, bits, block, w, scheme).dequantize()
    weights = torch.ones_like(weight) if w is None else w.expand_as(weight)
    return ((weight - stored).double() ** 2 * weights).reshape(-1, block).sum(-1)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_no_block_is_worse_than_round_to_nearest(name: str, bits: int, block: int) -> None:
    generator = torch.Generator().manual_seed(block + bits)
    weight = SHAPES[name](generator)
    for importance in (None, torch.rand(1, 128, generator=generator) ** 4, torch.rand(40, 128, generator=generator)):
        ours = block_errors(weight, "search", bits, block, importance)
        rtn = block_errors(weight, "rtn", bits, block, importance)
        assert (ours <= rtn * (1 + 1e-4) + 1e-20).all()


def test_the_search_is_clearly_better_where_it_matters() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(64, 256, generator=generator), torch.rand(1, 256, generator=generator) ** 3
    ours = block_errors(weight, "search", 4, 32, importance).sum()
    unweighted = quantize(weight, 4, 32).dequantize()
    assert ours < 0.85 * block_errors(weight, "rtn", 4, 32, importance).sum()
    assert ours < ((weight - unweighted) ** 2 * importance).sum()


def test_sixteen_levels_on_a_grid_are_stored_exactly() -> None:
    """A block that lies on any grid s (q - z), zero at any of its ends or inside, is stored without error."""
    for zero in (0, 3, 15):
        levels = torch.arange(16).repeat(2)[torch.randperm(32)].float()
        weight = ((levels - zero) * 0.25).reshape(1, 32)
        for scheme in ("rtn", "search"):
            assert torch.equal(quantize(weight, 4, 32, None, scheme).dequantize(), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_negation_mirrors_the_codes(bits: int) -> None:
    """-x is stored as well as x: an asymmetric code has no preferred sign."""
    weight = torch.randn(16, 64) + 0.3
    plus, minus = (float(block_errors(sign * weight, "search", bits, 32, None).sum()) for sign in (1, -1))
    assert minus == pytest.approx(plus, rel=0.1)


def test_chunking_and_stored_types() -> None:
    weight = torch.randn(3000, 64)
    whole = quantize(weight, 4, 32)
    part = quantize(weight[1500:1600], 4, 32)
    assert torch.equal(whole.codes[1500:1600], part.codes)
    assert (whole.codes.dtype, whole.scale.dtype, whole.zero.dtype) == (torch.uint8, torch.float16, torch.uint8)
    assert whole.scale.shape == whole.zero.shape == (3000, 2)
    assert int(whole.codes.max()) <= 15 and int(whole.zero.max()) <= 15


def test_packing_puts_the_even_index_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 15, 0, 7]], dtype=torch.uint8)
    assert pack_codes(codes, 4).tolist() == [[0x21, 0x0F, 0x07]]
    assert pack_codes(codes, 8).tolist() == codes.tolist()


def test_importance_picks_kept_experts_and_blends_rare_ones() -> None:
    sums = torch.zeros(1, 3, 4, dtype=torch.float64)
    sums[0, 0], sums[0, 2] = torch.tensor([4000.0, 0, 0, 0]), torch.tensor([0, 0, 0, 4000.0])
    imatrix = {"expert_in": sums, "expert_count": torch.tensor([[1000, 0, 1000]]), "attention_in": np.ones((1, 4))}
    kept = Importance(imatrix, {0: [1, 2]})
    routed, never = kept.of("expert_in", 0, 1), kept.of("expert_in", 0, 0)
    assert routed is not None and never is not None
    assert routed[0, 3] > 3.8 and routed[0, 0] < 0.2
    assert never[0, 0] == pytest.approx(never[0, 3]) and float(never.mean()) == pytest.approx(1, abs=0.01)
    assert torch.equal(kept.of("attention_in", 0), torch.ones(1, 4))
    assert kept.of("head_in", None) is None and Importance(None).of("expert_in", 0, 0) is None


def test_importance_counts_experts_from_the_first_moe_layer_and_knows_dense_blocks() -> None:
    imatrix = {
        "expert_in": torch.tensor([[[1.0, 3.0]], [[3.0, 1.0]]]),
        "expert_count": torch.full((2, 1), 1000),
        "ffn_in": torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]),
        "dense_in": torch.tensor([[1.0, 7.0], [0.0, 0.0], [0.0, 0.0]]),
    }
    found = Importance(imatrix, None, moe_layers=(1, 2))
    assert found.of("expert_in", 1, 0).tolist() == [[0.5, 1.5]]
    assert found.of("expert_in", 2, 0).tolist() == [[1.5, 0.5]]
    assert found.of("ffn_in", 0).tolist() == [[0.25, 1.75]] and found.of("ffn_in", 1).tolist() == [[1.0, 1.0]]
