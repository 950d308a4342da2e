"""The audit: what a file must be follows from the checkpoint alone, and every way to miss it has a name."""

from dataclasses import replace
from pathlib import Path

import pytest

from moe_edge.contracts.errors import MoeEdgeError
from moe_edge.contracts.quantization import RECIPES, bits_per_weight
from moe_edge.exporting import gguf
from moe_edge.exporting.gguf import write_gguf
from moe_edge.exporting.gguf_audit import audit, expected_tensors
from moe_edge.exporting.gguf_quantize import quantize_gguf
from moe_edge.runtimes.gguf_header import check_gguf_header
from tests.exporting.gguf_models import REPRESENTABLE, representable


def files(tmp_path: Path, family: str = "qwen3_moe", **options) -> tuple[Path, Path]:
    checkpoint = representable(tmp_path, family, **options)
    write_gguf(checkpoint, tmp_path / "f.gguf", name="x")
    return checkpoint, tmp_path / "f.gguf"


def quantized(tmp_path: Path, recipe: str, mix=None, **options) -> tuple[Path, Path]:
    checkpoint, full = files(tmp_path, **options)
    quantize_gguf(full, tmp_path / "q.gguf", recipe, None, 1, mix)
    return checkpoint, tmp_path / "q.gguf"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", REPRESENTABLE)
def test_what_is_written_is_what_the_checkpoint_implies(tmp_path, family, tied):
    checkpoint, full = files(tmp_path, family, tied=tied)
    found = audit([full], checkpoint, "F16")
    assert found.fallbacks == {} and found.bits_per_weight_by_class["expert_down"] == 16.0
    assert found.bits_per_weight_by_class["norm"] == 32.0
    wanted = expected_tensors(checkpoint, "F16")
    assert {name: item.shape for name, item in wanted.items()} == {
        name: tensor.shape for name, tensor in check_gguf_header(full).tensors.items()
    }


def test_bits_of_every_class_are_the_recipes(tmp_path):
    checkpoint, path = quantized(tmp_path, "Q4_K_M", hidden=256, width=256, head_dim=64)
    found = audit([path], checkpoint, "Q4_K_M")
    for name in ("expert_gate", "expert_down", "attention_q", "embedding"):
        assert found.bits_per_weight_by_class[name] == pytest.approx(bits_per_weight(RECIPES["Q4_K_M"][name]), abs=1e-3)
    assert found.fallbacks == {}
    assert sum(found.bytes_by_class.values()) == sum(t.bytes for t in check_gguf_header(path).tensors.values())
    assert found.bytes_by_class["expert_down"] == 2 * 6 * 256 * 256 // 256 * 176, "Q5_K in 2 layers of 6 experts"


def test_fallbacks_are_counted(tmp_path):
    """Two layers; rows of 256 and, in the down projections, of 48: not even a multiple of 32."""
    checkpoint, path = quantized(tmp_path, "Q4_K_M", hidden=256, width=48)
    assert audit([path], checkpoint, "Q4_K_M").fallbacks == {"Q5_K -> F16": 2, "Q6_K -> Q8_0": 2}
    checkpoint, path = quantized(tmp_path, "Q2_K", hidden=64, width=32, name="small")
    assert audit([path], checkpoint, "Q2_K").fallbacks == {
        "Q2_K -> IQ4_NL": 4,
        "Q3_K -> IQ4_NL": 2,
        "Q6_K -> Q8_0": 10,
    }


def test_an_expert_tensor_that_stayed_unquantized_fails_the_export(tmp_path):
    checkpoint, path = quantized(tmp_path, "Q4_K_M", {"expert_down@1-1": "F16"}, hidden=256, width=256)
    with pytest.raises(
        MoeEdgeError, match=r"'blk\.1\.ffn_down_exps\.weight' \(expert_down\) is F16, 16\.00 bits.*Q5_K"
    ):
        audit([path], checkpoint, "Q4_K_M")


def test_a_skipped_layer_fails_the_export(tmp_path, monkeypatch):
    """A writer that forgets a layer: its file is a valid GGUF and the quantizer copies what is there."""
    checkpoint = representable(tmp_path, "qwen3_moe", layers=3)
    real = gguf.file_entries
    monkeypatch.setattr(gguf, "file_entries", lambda *given: [e for e in real(*given) if e.layer != 1])
    write_gguf(checkpoint, tmp_path / "f.gguf", name="x")
    with pytest.raises(MoeEdgeError, match=r"'blk\.1\.attn_norm\.weight' is missing.* more"):
        audit([tmp_path / "f.gguf"], checkpoint, "F16")


def test_a_tensor_of_another_shape_or_of_no_model_fails_the_export(tmp_path, monkeypatch):
    checkpoint, _ = files(tmp_path)
    real = gguf.stored_tensors

    def renamed(entry, spec):
        found = real(entry, spec)
        return [
            replace(item, name="blk.0.extra.weight") if item.name == "blk.0.attn_q.weight" else item for item in found
        ]

    monkeypatch.setattr(gguf, "stored_tensors", renamed)
    write_gguf(checkpoint, tmp_path / "g.gguf", name="x")
    with pytest.raises(MoeEdgeError, match=r"attn_q\.weight' is missing; 'blk\.0\.extra\.weight' does not belong"):
        audit([tmp_path / "g.gguf"], checkpoint, "F16")

    monkeypatch.setattr(gguf, "stored_tensors", real)
    narrow = representable(tmp_path, "qwen3_moe", width=64, name="narrow")
    with pytest.raises(MoeEdgeError, match=r"ffn_gate_exps\.weight' has shape \(6, 32, 64\)"):
        audit([tmp_path / "f.gguf"], narrow, "F16")
