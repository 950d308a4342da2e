"""The feed-forward half of a decoder layer in the ONNX graph: MoE operator, shared expert, plain dense block.

A mixin over a class of onnxruntime-genai's model builder (see onnx_graph), fed by the family's own view of the layer, so
that layers may differ in experts, top-k and width. The router is in onnx_routing.

Legend: E experts, F expert width, D model width.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from moe_edge.exporting.onnx_routing import RoutingGraph, RoutingValues
from moe_edge.families.declared import Names
from moe_edge.models.views import MoELayerView

CHOICE = "moe_edge.choice"  # in a MoE node's meta: the values that select and weigh, and whether QMoE renormalises
MASS = "Mass"  # name of the Mul that QMoE, which keeps the weights as they are, does not need


class MoEGraph(RoutingGraph):
    """Mixin over a builder class: what `make_layer` calls after the second norm."""

    views: dict[int, MoELayerView]  # decoder layer -> its experts
    names: Names  # of a decoder layer's feed-forward block
    io_dtype: ir.DataType  # these three are the builder's
    model: ir.Model
    make_value: Callable[..., ir.Value]

    def make_feed_forward(self: Any, layer_id: int, layer: Any, root_input: str) -> None:
        """Append the layer's block; its output is what the residual connection adds next."""
        view = self.views.get(layer_id)
        if view is None:
            output = self._make_plain(layer_id, _gated(layer.get_submodule(self.names.block), self.names), root_input)
        else:
            output = self._make_experts(layer_id, view, root_input)
            if view.shared is not None:
                output = self._add_shared_expert(layer_id, view, root_input, output)
        self.layernorm_attrs["skip_input"] = output

    def _make_experts(self: Any, layer_id: int, view: MoELayerView, root_input: str) -> str:
        base, moe, experts = f"/model/layers.{layer_id}/moe", self.spec.moe, view.experts
        routing = self.make_routing(layer_id, view, root_input)
        weights = f"model.layers.{layer_id}.moe"
        gate_up, down = f"{weights}.gate_up.weight", f"{weights}.down.weight"
        transposed = getattr(experts, "is_transposed", False)
        self._expert_weight(gate_up, experts.gate_up_proj, _turned if transposed else _interleave, transposed)
        self._expert_weight(down, experts.down_proj, _turned if transposed else torch.Tensor.float, transposed)
        biases = {"gate_up": "", "down": ""}
        for part in biases if moe.expert_biases else ():
            biases[part] = f"{weights}.{part}.bias"
            self.make_initializer(getattr(experts, f"{part}_proj_bias").detach(), biases[part], to=self.io_dtype)
        clamped = moe.activation == "clamped_swiglu"
        self.make_node(
            "MoE",
            inputs=[root_input, routing.logits, gate_up, biases["gate_up"], down, biases["down"]],
            outputs=[f"{base}/MoE/output_0"],
            name=f"{base}/MoE",
            domain="com.microsoft",
            k=view.top_k,
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=moe.swiglu_alpha,
            activation_beta=1.0 if clamped else 0.0,
            normalize_routing_weights=int(routing.normalise),
            **({"swiglu_limit": moe.swiglu_limit} if clamped else {}),
        )
        self.make_value(f"{base}/MoE/output_0", self.io_dtype, shape=self.make_hidden_state_shape())
        if routing.choice is not None:
            choice = routing.choice
            found = (self.make_value(choice.selects), self.make_value(choice.weighs), choice.renormalise)
            self.make_value(f"{base}/MoE/output_0").producer().meta[CHOICE] = found
        output: str = self._weighed(base, routing)
        return output

    def _weighed(self: Any, base: str, routing: RoutingValues) -> str:
        """The operator's output times what its weights lack: their sum, and the factor on all routed experts."""
        output, shape, scale = f"{base}/MoE/output_0", self.make_hidden_state_shape(), self.spec.moe.routed_scale
        if routing.mass is not None:
            self.make_mul(f"{base}/{MASS}", [output, routing.mass], self.io_dtype, shape)
            output = f"{base}/{MASS}/output_0"
        if scale != 1.0:
            factor = f"/model/constants/{self.to_str_dtype(self.io_dtype)}/{scale}"
            self.make_mul(f"{base}/Scale", [output, factor], self.io_dtype, shape)
            output = f"{base}/Scale/output_0"
        return output

    def _expert_weight(self: Any, name: str, weight: torch.Tensor, layout: Any, transposed: bool) -> None:
        """Register an expert tensor that is laid out and converted only when it is read, one at a time."""

        def read() -> TorchTensor:
            return TorchTensor(layout(weight.detach()).to(dtype), name=name)

        dtype = torch.float16 if self.io_dtype == ir.DataType.FLOAT16 else torch.float32
        shape = weight.transpose(1, 2).shape if transposed else weight.shape
        tensor = ir.LazyTensor(read, dtype=self.io_dtype, shape=ir.Shape(shape), name=name)
        value = self.make_value(name, tensor.dtype, tensor.shape)
        value.const_value = tensor
        self.model.graph.register_initializer(value)

    def _make_plain(self: Any, layer_id: int, block: Any, root_input: str) -> str:
        """A gated MLP of its own width; returns its output's name."""
        width, self.intermediate_size = self.intermediate_size, block.gate_proj.weight.shape[0]
        self.make_mlp_proj(layer_id, block, root_input)
        self.intermediate_size = width
        output: str = self.mlp_attrs["output_0"]
        return output

    def _add_shared_expert(self: Any, layer_id: int, view: MoELayerView, root_input: str, routed: str) -> str:
        base, shape = f"/model/layers.{layer_id}/shared_expert_gate", self.make_hidden_state_shape()
        block = _split(view) if view.names.shared_gate_up else _gated(view.shared, self.names)
        shared = self._make_plain(layer_id, block, root_input)
        if self.spec.moe.shared_gated:
            gate = self.make_matmul(view.layer.get_submodule(view.names.shared_router), f"{base}/MatMul", root_input)
            one_wide = self.make_hidden_state_shape(last_dim=1)
            self.make_sigmoid(f"{base}/Sigmoid", f"{gate}/output_0", self.io_dtype, one_wide)
            self.make_mul(f"{base}/Mul", [shared, f"{base}/Sigmoid/output_0"], self.io_dtype, shape)
            shared = f"{base}/Mul/output_0"
        self.make_add(f"{base}/Add", [routed, shared], self.io_dtype, shape)
        return f"{base}/Add/output_0"


def _gated(block: Any, names: Names) -> SimpleNamespace:
    """A gated MLP under the builder's names."""
    parts = {"gate_proj": names.gate, "up_proj": names.up, "down_proj": names.down}
    return SimpleNamespace(**{name: block.get_submodule(path) for name, path in parts.items()})


def _split(view: MoELayerView) -> SimpleNamespace:
    """A shared expert that holds gate and up in one matrix, gate first, as a block with three."""
    assert view.shared is not None
    gate_up, down = (
        view.shared.get_submodule(name.removesuffix(".weight"))
        for name in (view.names.shared_gate_up, view.names.shared_down)
    )
    gate, up = (SimpleNamespace(weight=half, bias=None) for half in gate_up.get_parameter("weight").detach().chunk(2))
    return SimpleNamespace(gate_proj=gate, up_proj=up, down_proj=down)


def _interleave(gate_up: torch.Tensor) -> torch.Tensor:
    """[E, 2F, D] with gates first -> rows g0, u0, g1, u1, ... as the fused SwiGLU wants them, float32."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return torch.stack([gate, up], dim=2).reshape(gate_up.shape)


def _turned(weight: torch.Tensor) -> torch.Tensor:
    """[E, columns, rows], already interleaved -> [E, rows, columns], float32."""
    return weight.float().transpose(1, 2).contiguous()
