"""The audit of ONNX folders: a sound export passes for every family, and every way to miss it has a name."""

from pathlib import Path
from typing import Any

import onnx
import pytest

from moe_edge.contracts.errors import InputRejected, MoeEdgeError
from moe_edge.contracts.onnx_bits import PRECISIONS
from moe_edge.exporting import onnx_pack
from moe_edge.exporting.gguf_audit import StoredSizes
from moe_edge.exporting.onnx import export_onnx
from moe_edge.exporting.onnx_audit import audit_onnx
from moe_edge.exporting.onnx_graph import DecoderGraph
from moe_edge.exporting.onnx_pack import NODE_RULES, NodeRule, layer_of, rule_of
from moe_edge.families import DENSE_FAMILIES
from tests.exporting.onnx_models import CASES, case, spec_of
from tests.exporting.test_onnx_dense import dense_checkpoint
from tests.tiny import tiny_checkpoint

# A rule for every quantized matrix, and a family that has it.
RULES = {
    rule: "lfm2_moe" if "/conv/" in rule.pattern else "qwen2_moe"
    for rule in NODE_RULES
    if rule.weight_class != "router"
}


def audited(checkpoint: Path, out: Path, precision: str = "int4", block_size: int = 32, **options: Any) -> StoredSizes:
    summary = export_onnx(checkpoint, out, precision=precision, block_size=block_size, **options)
    found = audit_onnx(
        out, checkpoint, precision, block_size, options.get("layer_bits"), options.get("provider", "cpu")
    )
    assert (found.bytes_by_class, found.bits_per_weight_by_class) == (
        summary["bytes_by_class"],
        summary["bits_per_weight"],
    )
    return found


@pytest.mark.parametrize("family", CASES)
def test_every_familys_export_is_what_its_checkpoint_implies(family: str, tmp_path: Path) -> None:
    checkpoint = case(tmp_path, family)
    for precision in PRECISIONS:
        assert "expert" in audited(checkpoint, tmp_path / precision, precision).bytes_by_class
    assert "expert" in audited(checkpoint, tmp_path / "cuda", provider="cuda").bytes_by_class


@pytest.mark.parametrize("kind", DENSE_FAMILIES)
def test_dense_students_too(kind: str, tmp_path: Path) -> None:
    checkpoint = dense_checkpoint(tmp_path, kind)
    assert 4 < audited(checkpoint, tmp_path / "onnx").bits_per_weight_by_class["shared"] < 6


@pytest.mark.parametrize("head", [16, 8, 4])
def test_a_tied_embedding_is_counted_once_as_the_head(head: int, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen2_moe", tied=True)
    found = audited(checkpoint, tmp_path / "onnx", layer_bits={"head": head, "expert@1-1": 8}, block_size=64)
    assert "embedding" not in found.bytes_by_class and head <= found.bits_per_weight_by_class["head"] < head + 1


@pytest.mark.parametrize("family", CASES)
def test_experts_of_one_layer_that_stayed_float_fail(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint = case(tmp_path, family)
    last = spec_of(checkpoint).moe_layers[-1]

    def forgetful(name: str) -> NodeRule | None:
        return None if name.endswith("/moe/MoE") and layer_of(name) == last else rule_of(name)

    monkeypatch.setattr(onnx_pack, "rule_of", forgetful)
    export_onnx(checkpoint, tmp_path / "onnx", precision="int4")
    with pytest.raises(MoeEdgeError, match=rf"why:   expert of layer {last} is stored in 32 bits, asked for were 4\n"):
        audit_onnx(tmp_path / "onnx", checkpoint, "int4", 32)


@pytest.mark.parametrize("family", CASES)
def test_a_skipped_layer_fails(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    """The builder makes a sound graph of the other layers."""
    checkpoint, real = case(tmp_path, family), DecoderGraph.make_layer
    monkeypatch.setattr(
        DecoderGraph, "make_layer", lambda self, layer, module: real(self, layer, module) if layer else None
    )
    export_onnx(checkpoint, tmp_path / "onnx", precision="int4")
    with pytest.raises(MoeEdgeError, match=r"attention of layer 0 is missing; .* of layer 0 is missing"):
        audit_onnx(tmp_path / "onnx", checkpoint, "int4", 32)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.pattern)
def test_a_node_that_the_quantizer_has_no_rule_for_fails(rule: NodeRule, tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint = case(tmp_path, RULES[rule])
    monkeypatch.setattr(onnx_pack, "NODE_RULES", tuple(other for other in NODE_RULES if other != rule))
    export_onnx(checkpoint, tmp_path / "onnx", precision="int4")
    with pytest.raises(MoeEdgeError, match=rf"{rule.weight_class}( of layer \d)? is stored in .*32 bits"):
        audit_onnx(tmp_path / "onnx", checkpoint, "int4", 32)


def changed(folder: Path, change: Any) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model.graph)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def named(graph: onnx.GraphProto, end: str) -> Any:
    return next(item for item in (*graph.initializer, *graph.node) if item.name.endswith(end))


def drop_norm(graph: onnx.GraphProto) -> None:
    graph.initializer.remove(named(graph, "layers.1.input_layernorm.weight"))


def drop_up(graph: onnx.GraphProto) -> None:
    graph.node.remove(named(graph, "layers.1/mlp/up_proj/MatMul_MatMulNBits"))


def rename(graph: onnx.GraphProto) -> None:
    named(graph, "layers.1/mlp/up_proj/MatMul_MatMulNBits").name = "/model/layers.1/extra/MatMul"


def claim_eight(graph: onnx.GraphProto) -> None:
    node = named(graph, "layers.0/moe/MoE_QMoE")
    next(attribute for attribute in node.attribute if attribute.name == "expert_weight_bits").i = 8


def reshape(graph: onnx.GraphProto) -> None:
    named(graph, "layers.0.moe.gate_up.weight_Q4").dims[0] = 5


def wide_scales(graph: onnx.GraphProto) -> None:
    """Scales in float32 cost more than the precision says."""
    scale = named(graph, "layers.0.attn.o_proj.MatMul.weight_scale")
    scale.raw_data, scale.data_type = scale.raw_data * 2, onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_norm, "float of layer 1 has 192 weights, the model has 256"),
        (drop_up, "shared of layer 1 has 6144 weights, the model has 9216"),
        (rename, "'/model/layers.1/extra/MatMul' carries weights of no class"),
        (claim_eight, "expert of layer 0 has 18432 weights, the model has 36864"),
        (reshape, r"gate_up.weight_Q4' has 12288 bytes, its shape says 10240"),
        (wide_scales, r"attention of layer 0 takes 8.917 bits per weight, expected 8.750"),
    ],
)
def test_what_the_file_says_is_counted_and_not_believed(change: Any, words: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen2_moe")
    export_onnx(checkpoint, tmp_path / "onnx", precision="int4")
    changed(tmp_path / "onnx", change)
    with pytest.raises(MoeEdgeError, match=words):
        audit_onnx(tmp_path / "onnx", checkpoint, "int4", 32)


def test_another_precision_block_or_provider_than_asked_for_fails(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen2_moe")
    export_onnx(checkpoint, tmp_path / "onnx", precision="int4")
    for precision, block, bits in (("int8", 32, None), ("int4", 16, None), ("int4", 32, {"expert@0-0": 8})):
        with pytest.raises(MoeEdgeError, match="not what was asked for"):
            audit_onnx(tmp_path / "onnx", checkpoint, precision, block, bits)
    export_onnx(checkpoint, tmp_path / "cuda", precision="int4", provider="cuda")
    with pytest.raises(InputRejected, match="cuda"):
        audit_onnx(tmp_path / "cuda", checkpoint, "int4", 32)
