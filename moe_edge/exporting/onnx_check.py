"""What can be said of an ONNX folder without opening it: a graph for another machine's provider is checked this way only.

The operators that ONNX Runtime registers outside the ONNX standard are given its own domain before the standard checker
sees them, because the checker knows no others.
"""

from pathlib import Path
from typing import Any

import onnx

from moe_edge.contracts.errors import GateFailed
from moe_edge.storage.files import read_json

_RUNTIME_ONLY = ("SimplifiedLayerNormalization",)  # ONNX Runtime's, in the standard domain
_WANTED: dict[str, dict[str, int]] = {
    "QMoE": {"swiglu_fusion": 1, "weights_prepacked": 0},  # raw [E, N, K] codes, which CUDA lays out at load
    "MoE": {"swiglu_fusion": 1},
}


def check_cuda_folder(folder: Path) -> dict[str, int]:
    """Number of nodes per operator that carry weights, of a folder for CUDA.

    Raises:
        GateFailed: the graph is malformed, or says what the CUDA provider does not take.
    """
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    faults = [*_malformed(model, folder), *_wrong_nodes(model), *_wrong_ports(model)]
    options = read_json(folder / "genai_config.json")["model"]["decoder"]["session_options"]["provider_options"]
    if not any("cuda" in option for option in options):
        faults.append(f"genai_config.json asks for {options}, not for cuda")
    if faults:
        raise GateFailed("the ONNX graph for CUDA is not what its provider takes", why="; ".join(faults))
    operators = ("QMoE", "MoE", "MatMulNBits", "GroupQueryAttention", "GatherBlockQuantized")
    found = {name: sum(node.op_type == name for node in model.graph.node) for name in operators}
    return {name: count for name, count in found.items() if count}


def _malformed(model: onnx.ModelProto, folder: Path) -> list[str]:
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    for node in plain.graph.node:
        if node.op_type in _RUNTIME_ONLY:
            node.domain = "com.microsoft"
    beside = folder / "check.onnx"
    beside.write_bytes(plain.SerializeToString())  # the checker looks for external data beside a file
    try:
        onnx.checker.check_model(str(beside))
    except onnx.checker.ValidationError as error:
        return [str(error).splitlines()[0]]
    finally:
        beside.unlink()
    return []


def _wrong_nodes(model: onnx.ModelProto) -> list[str]:
    faults = []
    for node in model.graph.node:
        given: dict[str, Any] = {attribute.name: attribute.i for attribute in node.attribute}
        for name, value in _WANTED.get(node.op_type, {}).items():
            if given.get(name) != value:
                faults.append(f"{node.name}: {name} is {given.get(name)}, not {value}")
    return faults


def _wrong_ports(model: onnx.ModelProto) -> list[str]:
    """Inputs, outputs and initializers that would have the graph compute in float32."""
    single, ports = onnx.TensorProto.FLOAT, [*model.graph.input, *model.graph.output]
    wrong = [port.name for port in ports if port.type.tensor_type.elem_type == single]
    wrong += [tensor.name for tensor in model.graph.initializer if tensor.data_type == single]
    return [f"float32 in a float16 graph: {', '.join(wrong[:4])}"] if wrong else []
