"""The one adapter on onnxruntime-genai's model builder: a Hugging Face MoE model in, its float32 ONNX graph out.

The builder knows attention, rotary embeddings, norms, the KV cache and genai_config.json, but none of our families.
One mixin adds the mixture of experts (router, MoE operator, gated shared expert) to its attention classes. We only ever
ask it for a float graph; quantization is our own pass (onnx_pack), so that little of the builder's unstable interface
is used.

Legend: E experts, F expert width, D model width.
"""

import contextlib
import copy
import importlib
import io
import logging
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from moe_edge.contracts.errors import EnvironmentProblem, InputRejected
from moe_edge.contracts.spec import ModelSpec

logger = logging.getLogger(__name__)
BUILDER_VERSION = "0.18"
_PACKAGE = "onnxruntime_genai.models"
# model_type -> builder module, its attention class, the genai_config model type (one that the runtime accepts)
ATTENTION: dict[str, tuple[str, str, str]] = {
    "qwen3_moe": ("qwen", "Qwen3Model", "qwen3"),
    "qwen2_moe": ("qwen", "QwenModel", "qwen2"),
    "mixtral": ("mistral", "MistralModel", "mistral"),
    "olmoe": ("olmo", "OLMoModel", "olmo"),
}


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Turn the builder's prints into debug log lines."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stdout(captured):
            yield
    finally:
        for line in captured.getvalue().splitlines():
            logger.debug("builder: %s", line)


def check_builder() -> None:
    """Raises EnvironmentProblem unless the pinned builder is installed: its internals change with every release."""
    try:
        found = version("onnxruntime-genai")
    except PackageNotFoundError:
        found = "nothing"
    if not found.startswith(f"{BUILDER_VERSION}."):
        raise EnvironmentProblem(
            f"ONNX export needs onnxruntime-genai {BUILDER_VERSION}, found {found}",
            why="the exporter subclasses that release's model builder",
            next_command=f"pip install 'onnxruntime-genai=={BUILDER_VERSION}.*'",
        )


@cache
def _builder_class(module: str, name: str) -> type:
    """A builder class. Its modules import a top-level `quantization`: lend them that name while they load."""
    mine = sys.modules.get("quantization")
    sys.modules["quantization"] = importlib.import_module(f"{_PACKAGE}.quantization")
    try:
        return getattr(importlib.import_module(f"{_PACKAGE}.builders.{module}"), name)
    finally:
        del sys.modules["quantization"]
        if mine is not None:
            sys.modules["quantization"] = mine


class MoEGraph:
    """Mixin over a builder attention class: every layer's feed-forward is a mixture of experts in `layer.mlp`."""

    hf_model: Any
    spec: ModelSpec

    def load_weights(self, input_path: str) -> Any:
        return self.hf_model

    def has_lm_head(self, module: Any) -> bool:
        return module is self.hf_model.lm_head  # the builder goes by output width, which another layer may share

    def get_moe_module(self, layer_id: int, layer: Any) -> Any:
        return layer.mlp

    def is_local(self, layer_id: int) -> bool:
        return self.spec.sliding_window is not None  # the families refuse windows that differ between layers

    def make_moe(self: Any, layer_id: int, moe: Any, root_input: str) -> None:
        output = self._make_experts(layer_id, moe, root_input)
        if getattr(moe, "shared_expert", None) is not None:
            output = self._add_shared_expert(layer_id, moe, root_input, output)
        self.layernorm_attrs["skip_input"] = output

    def _make_experts(self: Any, layer_id: int, moe: Any, root_input: str) -> str:
        base = f"/model/layers.{layer_id}/moe"
        experts = moe.experts.down_proj.shape[0]
        router = self.make_matmul(moe.gate, f"{base}/router/MatMul", root_input)
        scores = f"{base}/router/Reshape"
        shape = f"/model/constants/INT64/{[-1, experts]}"
        self.make_reshape(scores, [f"{router}/output_0", shape], self.io_dtype, ["tokens", experts])
        gate_up, down = f"model.layers.{layer_id}.moe.gate_up.weight", f"model.layers.{layer_id}.moe.down.weight"
        self._expert_weight(gate_up, moe.experts.gate_up_proj, _interleave)
        self._expert_weight(down, moe.experts.down_proj, torch.Tensor.float)
        output = f"{base}/MoE/output_0"
        self.make_node(
            "MoE", inputs=[root_input, f"{scores}/output_0", gate_up, "", down], outputs=[output], name=f"{base}/MoE",
            domain="com.microsoft", k=self.moe_attrs["top_k"], activation_type="swiglu", swiglu_fusion=1,
            activation_alpha=1.0, activation_beta=0.0, normalize_routing_weights=int(self.spec.moe.renormalise),
        )  # fmt: skip
        self.make_value(output, self.io_dtype, shape=self.make_hidden_state_shape())
        return output

    def _expert_weight(self: Any, name: str, weight: torch.Tensor, layout: Any) -> None:
        """Register an expert tensor that is laid out and converted only when it is read, one at a time."""

        def read() -> TorchTensor:
            return TorchTensor(layout(weight.detach()), name=name)

        tensor = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(weight.shape), name=name)
        value = self.make_value(name, tensor.dtype, tensor.shape)
        value.const_value = tensor
        self.model.graph.register_initializer(value)

    def _add_shared_expert(self: Any, layer_id: int, moe: Any, root_input: str, routed: str) -> str:
        base, shape = f"/model/layers.{layer_id}/shared_expert_gate", self.make_hidden_state_shape()
        width, self.intermediate_size = self.intermediate_size, moe.shared_expert.gate_proj.weight.shape[0]
        self.make_mlp_proj(layer_id, moe.shared_expert, root_input)
        self.intermediate_size = width
        gate = self.make_matmul(moe.shared_expert_gate, f"{base}/MatMul", root_input)
        one_wide = self.make_hidden_state_shape(last_dim=1)
        self.make_sigmoid(f"{base}/Sigmoid", f"{gate}/output_0", self.io_dtype, one_wide)
        shared = self.mlp_attrs["output_0"]
        self.make_mul(f"{base}/Mul", [shared, f"{base}/Sigmoid/output_0"], self.io_dtype, shape)
        self.make_add(f"{base}/Add", [routed, f"{base}/Mul/output_0"], self.io_dtype, shape)
        return f"{base}/Add/output_0"


class FullWidthNorms:
    """Mixin for OLMoE: real norm weights, q/k norms over the full width, and optional clipping of q, k and v."""

    def make_attention_init(self: Any, config: Any) -> None:
        self.attention_attrs["q_norm"] = self.attention_attrs["k_norm"] = True
        super().make_attention_init(config)  # type: ignore[misc]

    def make_layernorm(self: Any, *args: Any, **kwargs: Any) -> None:
        base = _builder_class("base", "Model")
        base.make_layernorm(self, *args, **kwargs)  # OLMoModel would replace the weights by ones

    def make_qk_norm(self: Any, layer_id: int, attention: Any) -> None:
        for part, norm, width in (("q", attention.q_norm, self.q_size), ("k", attention.k_norm, self.kv_size)):
            name = f"/model/layers.{layer_id}/attn/{part}_norm/SimplifiedLayerNormalization"
            weight = f"model.layers.{layer_id}.attn.{part}_norm.layernorm.weight"
            self.make_initializer(norm.weight.detach(), weight, to=self.io_dtype)
            self.make_node(
                "SimplifiedLayerNormalization", inputs=[self.attention_attrs[f"{part}_path"], weight],
                outputs=[f"{name}/output_0"], name=name, epsilon=self.layernorm_attrs["epsilon"], axis=-1, stash_type=1,
            )  # fmt: skip
            self.make_value(f"{name}/output_0", self.io_dtype, shape=self.make_hidden_state_shape(last_dim=width))
            self.attention_attrs[f"{part}_path"] = f"{name}/output_0"
        if self.spec.clip_qkv is not None:
            self._clip(layer_id)

    def _clip(self: Any, layer_id: int) -> None:
        limits = [f"/model/constants/FLOAT/{sign * float(self.spec.clip_qkv)}" for sign in (-1, 1)]
        for part in "qkv":
            name, path = f"/model/layers.{layer_id}/attn/{part}_clip", f"{part}_path"
            width = self.q_size if part == "q" else self.kv_size
            shape = self.make_hidden_state_shape(last_dim=width)
            self.make_clip(name, [self.attention_attrs[path], *limits], self.io_dtype, shape)
            self.attention_attrs[path] = f"{name}/output_0"


def _interleave(gate_up: torch.Tensor) -> torch.Tensor:
    """[E, 2F, D] with gates first -> rows g0, u0, g1, u1, ... as the fused SwiGLU wants them, float32."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return torch.stack([gate, up], dim=2).reshape(gate_up.shape)


def build_graph(model: Any, spec: ModelSpec, checkpoint: Path, work: Path) -> Any:
    """Build the float32 graph of a Hugging Face MoE model.

    Args:
        model: a causal LM in any float dtype; its tensors are read lazily, so keep it alive until the graph is saved.
        checkpoint: the folder with its tokenizer and generation config.
        work: an empty folder for the builder's own temporary files.

    Returns:
        The finished builder: `.model` is the onnx_ir model; `write_companions` needs it too.

    Raises:
        EnvironmentProblem: another release of the builder is installed.
        InputRejected: the family has no row in ATTENTION.
    """
    check_builder()
    if spec.family not in ATTENTION:
        raise InputRejected(f"no ONNX export for '{spec.family}'", why=f"supported: {', '.join(ATTENTION)}")
    module, name, _ = ATTENTION[spec.family]
    mixins = (FullWidthNorms, MoEGraph) if spec.qk_norm == "full_width" else (MoEGraph,)
    config = copy.deepcopy(model.config)
    config._name_or_path, config.architectures = str(checkpoint), [type(model).__name__]
    options = {"shared_embeddings": spec.tied_embeddings, "windowed_kv_cache": False, "hf_token": False}
    with silenced():
        kind = type(f"MoE{name}", (*mixins, _builder_class(module, name)), {"spec": spec})
        builder = kind(config, ir.DataType.FLOAT, ir.DataType.FLOAT, "cpu", str(work), options)
        builder.hf_model = model
        builder.make_model("")
    builder.model.producer_name = "moe-edge"
    return builder


def write_companions(builder: Any, checkpoint: Path, out: Path) -> None:
    """Write genai_config.json and the tokenizer (chat template included) beside the graph.

    Raises:
        OSError, ValueError: the checkpoint's tokenizer cannot be read.
    """
    builder.model_type = ATTENTION[builder.spec.family][2]
    config = copy.deepcopy(builder.hf_model.config)
    config._name_or_path = str(checkpoint)
    with silenced():
        builder.make_genai_config(config, {"local_files_only": True}, str(out))
        builder.save_processing(str(checkpoint), {"local_files_only": True}, str(out))
