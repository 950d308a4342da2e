"""The one adapter on onnxruntime-genai's model builder: a Hugging Face MoE model in, its float32 ONNX graph out.

The builder knows attention, rotary embeddings, norms, the KV cache and genai_config.json, but none of our families.
Mixins correct what it guesses (frequencies, windows, scales) and add the mixture of experts (onnx_moe). We only ever ask
it for a float graph; quantization is our own pass (onnx_pack), so that little of its unstable interface is used.
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

from moe_edge.contracts.capabilities import refusals
from moe_edge.contracts.errors import EnvironmentProblem, InputRejected
from moe_edge.contracts.onnx_bits import Provider
from moe_edge.contracts.spec import ModelSpec
from moe_edge.exporting.onnx_moe import MoEGraph
from moe_edge.families import student_family
from moe_edge.families.declared import AttentionNames
from moe_edge.models.loading import configured_ends
from moe_edge.models.views import moe_layers
from moe_edge.storage.files import read_json, write_json_atomic

logger = logging.getLogger(__name__)
BUILDER_VERSION = "0.18"
_PACKAGE = "onnxruntime_genai.models"
_DTYPES: dict[Provider, ir.DataType] = {"cpu": ir.DataType.FLOAT, "cuda": ir.DataType.FLOAT16}
# model_type -> builder module, its attention class, the genai_config model type (one that the runtime accepts)
ATTENTION: dict[str, tuple[str, str, str]] = {
    "qwen3_moe": ("qwen", "Qwen3Model", "qwen3"),
    "qwen2_moe": ("qwen", "QwenModel", "qwen2"),
    "mixtral": ("mistral", "MistralModel", "mistral"),
    "olmoe": ("olmo", "OLMoModel", "olmo"),
    "granitemoe": ("mistral", "MistralModel", "granite"),
    "granitemoeshared": ("mistral", "MistralModel", "granite"),
    "ernie4_5_moe": ("mistral", "MistralModel", "ernie4_5"),
    "qwen3": ("qwen", "Qwen3Model", "qwen3"),
    "qwen2": ("qwen", "QwenModel", "qwen2"),
    "mistral": ("mistral", "MistralModel", "mistral"),
    "granite": ("mistral", "MistralModel", "granite"),
    "llama": ("mistral", "MistralModel", "llama"),
    "gpt_oss": ("mistral", "MistralModel", "gptoss"),
    "glm4_moe": ("mistral", "MistralModel", "llama"),
    "minimax_m2": ("mistral", "MistralModel", "llama"),
    "lfm2_moe": ("lfm2", "LFM2Model", "lfm2_moe"),
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
def _builder_class(module: str, name: str) -> Any:
    """A builder class. Its modules import a top-level `quantization`: lend them that name while they load."""
    shadowed = sys.modules.get("quantization")
    sys.modules["quantization"] = importlib.import_module(f"{_PACKAGE}.quantization")
    try:
        return getattr(importlib.import_module(f"{_PACKAGE}.builders.{module}"), name)
    finally:
        del sys.modules["quantization"]
        if shadowed is not None:
            sys.modules["quantization"] = shadowed


class DecoderGraph:
    """Mixin over a builder class: reads from our spec and the loaded model what the builder would guess from names."""

    hf_model: Any
    spec: ModelSpec
    attention_names: AttentionNames

    def __init__(self: Any, *args: Any) -> None:
        super().__init__(*args)
        spec = self.spec
        self.embed_attrs["scale"] = spec.embedding_scale
        self.lm_head_attrs["scale"] = 1 / spec.logits_divisor
        self.rope_attrs["interleaved"] = int(spec.paired_rotary)
        self.attention_attrs["sinks"] = spec.sinks
        if spec.attention_scale is not None:
            self.attention_attrs["scale"] = spec.attention_scale

    def make_attention_init(self: Any, config: Any) -> None:
        self.attention_attrs["q_norm"] = self.attention_attrs["k_norm"] = self.spec.qk_norm != "none"
        super().make_attention_init(config)  # type: ignore[misc]

    def make_rope_init(self, config: Any) -> None:
        """Of its classes only one knows Llama 3's rotation; the caches are the model's own anyway."""
        if self.spec.rope_scaling is None or self.spec.rope_scaling["rope_type"] != "llama3":
            super().make_rope_init(config)  # type: ignore[misc]

    def make_intermediate_size_init(self, config: Any) -> None:
        """LFM2's class derives a width from keys that its mixtures lack; here each block has its own."""

    def load_weights(self, input_path: str) -> Any:
        return self.hf_model

    def has_lm_head(self, module: Any) -> bool:
        return module is self.hf_model.lm_head  # the builder goes by output width, which another layer may share

    def is_local(self, layer_id: int) -> bool:
        windowed = not self.spec.layer_kinds or self.spec.kind_of(layer_id) == "sliding"
        return self.spec.sliding_window is not None and windowed

    def make_rotary_embedding_caches_from_scratch(self: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [positions, head / 2] of the model's own frequencies, scaled or not."""
        rotary = next(module for module in self.hf_model.modules() if hasattr(module, "inv_freq"))
        positions = torch.arange(self.rope_attrs["cache_length"], dtype=torch.float32)
        angles = torch.outer(positions, rotary.inv_freq.float())
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    def make_layer(self: Any, layer_id: int, layer: Any) -> None:
        norms, simple = self.layernorm_attrs, self.layernorm_attrs["simple"]
        first, names = norms["first_layernorm"], self.attention_names
        before, after = (layer.get_submodule(name) for name in (names.input_norm, names.post_attention_norm))
        self.make_layernorm(layer_id, before, skip=not first, simple=simple, location="input")
        if self.spec.kind_of(layer_id) == "conv":
            norms["skip_input"] = self.make_short_conv(layer_id, layer.conv, norms["output_0"])
        else:
            self.make_attention(layer_id, layer.self_attn, root_input=norms["output_0"])
        self._scale_residual(layer_id, "attn")
        self.make_layernorm(layer_id, after, skip=True, simple=simple, location="post_attention")
        self.make_feed_forward(layer_id, layer, norms["output_0"])
        self._scale_residual(layer_id, "mlp")
        norms["first_layernorm"] = False
        norms["last_layernorm"] = layer_id == self.num_layers - 1

    def _scale_residual(self: Any, layer_id: int, block: str) -> None:
        """Multiply what the residual connection adds next."""
        if self.spec.residual_scale == 1.0:
            return
        name, scale = (
            f"/model/layers.{layer_id}/residual_{block}/Mul",
            f"/model/constants/{self.to_str_dtype(self.io_dtype)}/{self.spec.residual_scale}",
        )
        self.make_mul(name, [self.layernorm_attrs["skip_input"], scale], self.io_dtype, self.make_hidden_state_shape())
        self.layernorm_attrs["skip_input"] = f"{name}/output_0"


class FullWidthNorms:
    """Mixin for OLMoE: real norm weights, q/k norms over the full width, and optional clipping of q, k and v."""

    def is_fused_qk_norm_gqa_supported(self) -> bool:
        return False  # attention's own norms on CUDA are per head

    def make_layernorm(self: Any, *args: Any, **kwargs: Any) -> None:
        base = _builder_class("base", "Model")
        base.make_layernorm(self, *args, **kwargs)  # OLMoModel would replace the weights by ones

    def make_qk_norm(self: Any, layer_id: int, attention: Any) -> None:
        for part, norm, width in (("q", attention.q_norm, self.q_size), ("k", attention.k_norm, self.kv_size)):
            name = f"/model/layers.{layer_id}/attn/{part}_norm/SimplifiedLayerNormalization"
            weight = f"model.layers.{layer_id}.attn.{part}_norm.layernorm.weight"
            self.make_initializer(norm.weight.detach(), weight, to=self.io_dtype)
            self.make_node(
                "SimplifiedLayerNormalization",
                inputs=[self.attention_attrs[f"{part}_path"], weight],
                outputs=[f"{name}/output_0"],
                name=name,
                epsilon=self.layernorm_attrs["epsilon"],
                axis=-1,
                stash_type=1,
            )
            self.make_value(f"{name}/output_0", self.io_dtype, shape=self.make_hidden_state_shape(last_dim=width))
            self.attention_attrs[f"{part}_path"] = f"{name}/output_0"
        if self.spec.clip_qkv is not None:
            self._clip(layer_id)

    def _clip(self: Any, layer_id: int) -> None:
        limits = [
            f"/model/constants/{self.to_str_dtype(self.io_dtype)}/{sign * float(self.spec.clip_qkv)}"
            for sign in (-1, 1)
        ]
        for part in "qkv":
            name, path = f"/model/layers.{layer_id}/attn/{part}_clip", f"{part}_path"
            width = self.q_size if part == "q" else self.kv_size
            shape = self.make_hidden_state_shape(last_dim=width)
            self.make_clip(name, [self.attention_attrs[path], *limits], self.io_dtype, shape)
            self.attention_attrs[path] = f"{name}/output_0"


def build_graph(model: Any, spec: ModelSpec, checkpoint: Path, work: Path, provider: Provider = "cpu") -> Any:
    """Build the graph of a Hugging Face model: float32 for the CPU, float16 for CUDA.

    Args:
        model: a causal LM in any float dtype; its tensors are read lazily, so keep it alive until the graph is saved.
        checkpoint: the folder with its tokenizer and generation config.
        work: an empty folder for the builder's own temporary files.

    Returns:
        The finished builder: `.model` is the onnx_ir model; `write_companions` needs it too.

    Raises:
        EnvironmentProblem: another release of the builder is installed.
        InputRejected: ONNX Runtime would compute something else (contracts/capabilities.py).
    """
    check_builder()
    if wrong := refusals("ort", spec):
        raise InputRejected(f"this {spec.family} model cannot be exported as ONNX", why="; ".join(wrong))
    module, name, _ = ATTENTION[spec.family]
    mixins = (*((FullWidthNorms,) if spec.qk_norm == "full_width" else ()), MoEGraph, DecoderGraph)
    views = {view.index: view for view in (moe_layers(model) if spec.moe_layers else ())}
    family = student_family(model.config.to_dict())
    parts = {"spec": spec, "views": views, "names": family.in_memory, "attention_names": family.attention_names}
    config = copy.deepcopy(model.config)
    config._name_or_path, config.architectures = str(checkpoint), [type(model).__name__]
    options = {"shared_embeddings": spec.tied_embeddings, "windowed_kv_cache": False, "hf_token": False}
    with silenced():
        kind = type(f"MoE{name}", (*mixins, _builder_class(module, name)), parts)
        builder = kind(config, _DTYPES[provider], _DTYPES[provider], provider, str(work), options)
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
    _name_every_end(out / "genai_config.json", [end for ids in configured_ends(checkpoint).values() for end in ids])


def _name_every_end(path: Path, ends: list[int]) -> None:
    """The builder takes the ends of the generation configuration in the place of those of config.json; both end a text."""
    config = read_json(path)
    written = config["model"].get("eos_token_id")
    known = written if isinstance(written, list) else [] if written is None else [written]
    if further := [end for end in dict.fromkeys(ends) if end not in known and 0 <= end < config["model"]["vocab_size"]]:
        config["model"]["eos_token_id"] = [*known, *further]
        write_json_atomic(path, config)
