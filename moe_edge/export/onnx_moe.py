"""The feed-forward half of a decoder layer in the ONNX graph: router, MoE operator, shared expert, plain dense block.

A mixin over a class of onnxruntime-genai's model builder (see onnx_graph), fed by the family's own view of the layer.
The operator only knows the softmax of the K largest logits. Where a bias selects the experts, the graph selects, and hands
the operator the chosen experts' logits and a very low number for all others: its softmax over them is the renormalised one.

Legend: E experts, K top-k, F expert width, D model width.
"""

from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from moe_edge.contracts.spec import ModelSpec
from moe_edge.families.views import MoELayerView

NOT_CHOSEN = -10000.0  # a logit whose share in a softmax is exactly 0


class MoEGraph:
    """Mixin over a builder class: what `make_layer` calls after the second norm."""

    spec: ModelSpec
    views: dict[int, MoELayerView]  # decoder layer -> its experts
    dense_block: str  # module of a layer without experts

    def make_feed_forward(self: Any, layer_id: int, layer: Any, root_input: str) -> None:
        """Append the layer's block; its output is what the residual connection adds next."""
        view = self.views.get(layer_id)
        if view is None:
            block = layer.get_submodule(self.dense_block)
            output = self._make_plain(layer_id, block, root_input)
        else:
            output = self._make_experts(layer_id, view, root_input)
            if view.shared is not None:
                output = self._add_shared_expert(layer_id, view, root_input, output)
        self.layernorm_attrs["skip_input"] = output

    def _make_experts(self: Any, layer_id: int, view: MoELayerView, root_input: str) -> str:
        name, moe, experts = f"/model/layers.{layer_id}/moe/MoE", self.spec.moe, view.experts
        scores = self._make_router(layer_id, view, root_input)
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
            "MoE", inputs=[root_input, scores, gate_up, biases["gate_up"], down, biases["down"]],
            outputs=[f"{name}/output_0"], name=name, domain="com.microsoft", k=view.top_k,
            activation_type="swiglu", swiglu_fusion=1, activation_alpha=moe.swiglu_alpha,
            activation_beta=1.0 if clamped else 0.0, normalize_routing_weights=int(moe.renormalise),
            **({"swiglu_limit": moe.swiglu_limit} if clamped else {}),
        )  # fmt: skip
        self.make_value(f"{name}/output_0", self.io_dtype, shape=self.make_hidden_state_shape())
        return f"{name}/output_0"

    def _make_router(self: Any, layer_id: int, view: MoELayerView, root_input: str) -> str:
        """What the operator takes for logits, shape (tokens, E)."""
        base = f"/model/layers.{layer_id}/moe/router"
        logits = self.make_matmul(view.router, f"{base}/MatMul", root_input)
        if self.spec.moe.router_bias:
            self.make_add_bias(view.router.bias.detach(), f"{base}/Add", root_input=f"{logits}/output_0")
            logits = f"{base}/Add"
        shape = f"/model/constants/INT64/{[-1, view.count]}"
        self.make_reshape(f"{base}/Reshape", [f"{logits}/output_0", shape], self.io_dtype, ["tokens", view.count])
        if not self.spec.moe.selection_bias:
            return f"{base}/Reshape/output_0"
        return self._choose(base, view, f"{base}/Reshape/output_0")

    def _choose(self: Any, base: str, view: MoELayerView, logits: str) -> str:
        """The logits of the K experts with the largest biased probability; NOT_CHOSEN for the others."""
        every, chosen = ["tokens", view.count], ["tokens", view.top_k]
        bias = f"{base[1:].replace('/', '.')}.selection_bias"
        self.make_initializer(view.selection_bias.tensor.detach().reshape(-1), bias, to=self.io_dtype)
        self.make_softmax(f"{base}/Softmax", logits, self.io_dtype, every)
        self.make_add(f"{base}/Biased", [f"{base}/Softmax/output_0", bias], self.io_dtype, every)
        count = f"/model/constants/INT64/{[view.top_k]}"
        self.make_topk(f"{base}/TopK", [f"{base}/Biased/output_0", count], self.io_dtype, chosen)
        index = f"{base}/TopK/output_1"
        self.make_gather_elements(f"{base}/GatherElements", [logits, index], self.io_dtype, chosen, axis=1)
        self.make_shape(f"{base}/Shape", logits, [2])
        nothing = ir.tensor([NOT_CHOSEN], dtype=ir.DataType.FLOAT)
        self.make_constant_of_shape(f"{base}/Nothing", f"{base}/Shape/output_0", nothing, self.io_dtype, every)
        inputs = [f"{base}/Nothing/output_0", index, f"{base}/GatherElements/output_0"]
        self.make_scatter_elements(f"{base}/ScatterElements", inputs, self.io_dtype, every, axis=1)
        return f"{base}/ScatterElements/output_0"

    def _expert_weight(self: Any, name: str, weight: torch.Tensor, layout: Any, transposed: bool) -> None:
        """Register an expert tensor that is laid out and converted only when it is read, one at a time."""

        def read() -> TorchTensor:
            return TorchTensor(layout(weight.detach()), name=name)

        shape = weight.transpose(1, 2).shape if transposed else weight.shape
        tensor = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)
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
        block = _split(view) if view.names.shared_gate_up else view.shared
        shared = self._make_plain(layer_id, block, root_input)
        if self.spec.moe.shared_gated:
            gate = self.make_matmul(view.layer.get_submodule(view.names.shared_router), f"{base}/MatMul", root_input)
            one_wide = self.make_hidden_state_shape(last_dim=1)
            self.make_sigmoid(f"{base}/Sigmoid", f"{gate}/output_0", self.io_dtype, one_wide)
            self.make_mul(f"{base}/Mul", [shared, f"{base}/Sigmoid/output_0"], self.io_dtype, shape)
            shared = f"{base}/Mul/output_0"
        self.make_add(f"{base}/Add", [routed, shared], self.io_dtype, shape)
        return f"{base}/Add/output_0"


def _split(view: MoELayerView) -> SimpleNamespace:
    """A shared expert that holds gate and up in one matrix, gate first, as a block with three."""
    gate_up, down = (
        view.shared.get_submodule(name.removesuffix(".weight"))
        for name in (view.names.shared_gate_up, view.names.shared_down)
    )
    gate, up = (SimpleNamespace(weight=half, bias=None) for half in gate_up.weight.detach().chunk(2))
    return SimpleNamespace(gate_proj=gate, up_proj=up, down_proj=down)


def _interleave(gate_up: torch.Tensor) -> torch.Tensor:
    """[E, 2F, D] with gates first -> rows g0, u0, g1, u1, ... as the fused SwiGLU wants them, float32."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return torch.stack([gate, up], dim=2).reshape(gate_up.shape)


def _turned(weight: torch.Tensor) -> torch.Tensor:
    """[E, columns, rows], already interleaved -> [E, rows, columns], float32."""
    return weight.float().transpose(1, 2).contiguous()
