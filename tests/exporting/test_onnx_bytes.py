"""The planner's bytes are the file's: per class, for every family, precision, block size and choice of bits per layer."""

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest

from moe_edge.contracts.onnx_bits import PRECISIONS, weight_class
from moe_edge.exporting.onnx import export_onnx
from moe_edge.planning.estimate import ONNX_GRAPH_BYTES, Packing, file_bytes, stored_bytes, stored_groups
from moe_edge.planning.headers import model_headers
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.exporting.onnx_models import CASES, case, hf_logits, kl_nats, ort_logits
from tests.tiny import tiny_checkpoint


def predicted(checkpoint: Path, packing: Packing) -> tuple[dict[str, int], int]:
    """Bytes per class, and of the whole file."""
    model = model_headers(inspect_checkpoint(checkpoint))
    by_class: Counter[str] = Counter()
    for group in stored_groups(model, model.spec.moe.experts, packing):
        size = stored_bytes(packing, group.tensor_class, group.shape, group.layer)
        by_class[weight_class(group.tensor_class) or "float"] += group.tensors * size
    by_class.pop("float")
    return dict(by_class), file_bytes(model, model.spec.moe.experts, packing)


def check(checkpoint: Path, out: Path, packing: Packing, **options: Any) -> dict[str, Any]:
    summary = export_onnx(checkpoint, out, precision=packing.name, block_size=packing.block, **options)
    by_class, total = predicted(checkpoint, packing)
    assert summary["bytes_by_class"] == {name: size for name, size in by_class.items() if size}
    assert abs(summary["bytes"] - total) < ONNX_GRAPH_BYTES + 4096 * 10, "the graph itself is a round number"
    return summary


@pytest.mark.parametrize("family", CASES)
def test_every_family_at_every_precision(family: str, tmp_path: Path) -> None:
    checkpoint = case(tmp_path, family)
    for precision in PRECISIONS:
        check(checkpoint, tmp_path / precision, Packing("onnx", precision))


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("tied", [False, True])
def test_block_sizes_and_tied_heads(block: int, tied: bool, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen2_moe", hidden=128, width=96, tied=tied)
    mix = {"embedding": 16, "head": 4}  # a tied embedding is the head
    packing = Packing("onnx", "int4", block, tuple((key, str(bits)) for key, bits in mix.items()))
    check(checkpoint, tmp_path / "onnx", packing, layer_bits=mix)


def test_bits_per_class_and_layer_reach_nodes_and_prediction(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen2_moe", layers=4)
    mix = {"expert@0-1": 8, "attention@3-3": 4, "shared": 4, "embedding": 16}
    packing = Packing("onnx", "int4", 32, tuple((key, str(bits)) for key, bits in mix.items()))
    summary = check(checkpoint, tmp_path / "onnx", packing, layer_bits=mix)
    assert summary["bits"]["expert"] == [4, 8] and summary["bits"]["attention"] == [4, 8]
    nodes = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.node
    bits = {
        node.name: {a.name: a.i for a in node.attribute} for node in nodes if node.op_type in ("QMoE", "MatMulNBits")
    }
    experts = [value["expert_weight_bits"] for name, value in bits.items() if "/moe/MoE" in name]
    attention = [value["bits"] for name, value in bits.items() if "/attn/qkv" in name]
    shared = {value["bits"] for name, value in bits.items() if "/mlp/" in name}
    assert kl_nats(hf_logits(checkpoint), ort_logits(tmp_path / "onnx")) < 0.02
    assert (experts, attention, shared) == ([8, 8, 4, 4], [8, 8, 8, 4], {4})
