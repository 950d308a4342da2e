"""The folder for CUDA, by structure only: float16 ports, raw QMoE weights, provider options; and broken ones are caught."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from moe_edge.contracts.errors import ConfigError, GateFailed, InputRejected
from moe_edge.exporting.onnx import export_onnx
from moe_edge.exporting.onnx_check import check_cuda_folder
from moe_edge.runtimes.ort import OrtRuntime
from tests.exporting.onnx_models import CASES, case, initializers, spec_of
from tests.tiny import tiny_checkpoint

HALF, SINGLE, BYTES = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8


@pytest.mark.parametrize("family", CASES)
def test_every_family_is_float16_throughout_with_raw_expert_weights(family: str, tmp_path: Path) -> None:
    checkpoint, folder = case(tmp_path, family), tmp_path / "onnx"
    export_onnx(checkpoint, folder, precision="int4", provider="cuda")
    spec, model = spec_of(checkpoint), onnx.load(folder / "model.onnx", load_external_data=False)
    assert check_cuda_folder(folder)["QMoE"] == len(spec.moe_layers)
    for port in [*model.graph.input, *model.graph.output]:
        kind = port.type.tensor_type.elem_type
        assert kind == (onnx.TensorProto.INT64 if port.name in ("input_ids", "attention_mask") else HALF), port.name
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert SINGLE not in kinds.values()
    for node in model.graph.node:
        given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert "accuracy_level" not in given, "a level of CPU kernels"
        if node.op_type == "QMoE":
            assert (given["weights_prepacked"], given["expert_weight_bits"], given["block_size"]) == (0, 4, 32)
            assert (kinds[node.input[2]], kinds[node.input[3]], kinds[node.input[11]]) == (BYTES, HALF, BYTES)
        if node.op_type == "GroupQueryAttention":
            assert (len(node.input) > 14) is (spec.qk_norm == "per_head"), "the kernel's own norms are per head"
        if node.op_type == "MatMulNBits":
            assert given["bits"] == 8 and (kinds[node.input[1]], kinds[node.input[2]]) == (BYTES, HALF)
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["session_options"]["provider_options"] == [{"cuda": {"enable_cuda_graph": "0"}}]


def test_codes_are_those_of_the_cpu_graph(tmp_path: Path) -> None:
    """What the parity of the graph for the CPU says of the quantized weights holds for this one, too."""
    import torch

    checkpoint = tiny_checkpoint(tmp_path, "qwen2_moe", dtype=torch.float16)
    for provider in ("cpu", "cuda"):
        export_onnx(checkpoint, tmp_path / provider, precision="int4", provider=provider)
    cpu, cuda = initializers(tmp_path / "cpu"), initializers(tmp_path / "cuda")
    codes = [name for name in cpu if name.endswith(("_Q4", "_Q8", "_zp", "_scale"))]
    assert len(codes) > 20 and all(np.array_equal(cpu[name], cuda[name]) for name in codes)


def test_fp16_keeps_the_operator_moe_and_fp32_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "olmoe")
    nodes = export_onnx(checkpoint, tmp_path / "onnx", precision="fp16", provider="cuda")["nodes"]
    assert nodes["MoE"] == 2 and "QMoE" not in nodes and nodes.get("Cast", 0) <= 2
    with pytest.raises(ConfigError, match="float16"):
        export_onnx(checkpoint, tmp_path / "x", precision="fp32", provider="cuda")


def test_the_cpu_runtime_refuses_the_folder(tmp_path: Path) -> None:
    export_onnx(tiny_checkpoint(tmp_path, "qwen3_moe"), tmp_path / "onnx", precision="int4", provider="cuda")
    with pytest.raises(InputRejected, match="cuda"):
        OrtRuntime(tmp_path / "onnx", 1, 64)


def prepacked(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "QMoE")
    next(attribute for attribute in node.attribute if attribute.name == "weights_prepacked").i = 1


def single(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = SINGLE


def unsorted(model: onnx.ModelProto) -> None:
    last = onnx.NodeProto()
    last.CopyFrom(model.graph.node[-1])
    del model.graph.node[-1]
    model.graph.node.insert(0, last)


@pytest.mark.parametrize(
    ("breaks", "words"), [(prepacked, "weights_prepacked is 1"), (single, "float32"), (unsorted, "sorted")]
)
def test_a_broken_graph_is_caught(breaks: Callable[[onnx.ModelProto], None], words: str, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    export_onnx(tiny_checkpoint(tmp_path, "qwen3_moe"), folder, precision="int4", provider="cuda")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    breaks(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(GateFailed, match=words):
        check_cuda_folder(folder)
    assert not (folder / "check.onnx").exists()
