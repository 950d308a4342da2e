"""How each family looks inside a GGUF file: tensor names, metadata and row orders, as data.

What: `LAYOUTS` (family -> how its file differs), `TENSOR_NAMES` (neutral tensor -> GGUF name), and the refusal of a model
that llama.cpp would silently compute differently (contracts/capabilities.py). A new family is one row in each table.
Facts: llama.cpp src/models/{llama,qwen2moe,qwen3moe,olmoe,granite-moe,openai-moe,ernie4-5-moe}.cpp.
Legend: D model width, F expert width.
"""

import re
from dataclasses import dataclass

from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType

from moe_edge.contracts.capabilities import Capability, capability, refusals
from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.spec import ModelSpec, TensorClass, TensorEntry


@dataclass(frozen=True)
class Layout:
    """How the file of one family differs from its sisters'; what the graph computes is in contracts/capabilities.py."""

    width_is_expert: bool  # F is expert_feed_forward_length; otherwise feed_forward_length alone
    permutes_rope: bool  # rotates neighbouring pairs where transformers rotates halves: rows of q and k are interleaved
    multiplies: bool = False  # the four multipliers are metadata
    counts_dense: bool = False  # so is the number of layers without experts, which come first
    ffn_norm: str = "ffn_norm"  # what this file calls the norm before the feed-forward block


LAYOUTS: dict[str, Layout] = {
    "mixtral": Layout(width_is_expert=False, permutes_rope=True),
    "qwen2_moe": Layout(width_is_expert=True, permutes_rope=False),
    "qwen3_moe": Layout(width_is_expert=True, permutes_rope=False),
    "olmoe": Layout(width_is_expert=False, permutes_rope=False),
    "granitemoe": Layout(width_is_expert=False, permutes_rope=True, multiplies=True),
    "granitemoeshared": Layout(width_is_expert=False, permutes_rope=True, multiplies=True),
    "ernie4_5_moe": Layout(width_is_expert=True, permutes_rope=False, counts_dense=True),
    "gpt_oss": Layout(width_is_expert=True, permutes_rope=False, ffn_norm="post_attention_norm"),
}

# (class, part) -> name; {} is the layer
_FFN_NORM: tuple[TensorClass, str] = ("norm", "post_attention_norm")  # the one name in which the files differ
TENSOR_NAMES: dict[tuple[TensorClass, str], str] = {
    ("embedding", "weight"): "token_embd.weight",
    ("norm", "final_norm"): "output_norm.weight",
    ("head", "weight"): "output.weight",
    ("norm", "input_norm"): "blk.{}.attn_norm.weight",
    ("norm", "q_norm"): "blk.{}.attn_q_norm.weight",
    ("norm", "k_norm"): "blk.{}.attn_k_norm.weight",
    _FFN_NORM: "blk.{}.ffn_norm.weight",
    ("attention_q", "weight"): "blk.{}.attn_q.weight",
    ("attention_k", "weight"): "blk.{}.attn_k.weight",
    ("attention_v", "weight"): "blk.{}.attn_v.weight",
    ("attention_o", "weight"): "blk.{}.attn_output.weight",
    ("attention_bias", "q_bias"): "blk.{}.attn_q.bias",
    ("attention_bias", "k_bias"): "blk.{}.attn_k.bias",
    ("attention_bias", "v_bias"): "blk.{}.attn_v.bias",
    ("attention_bias", "o_bias"): "blk.{}.attn_output.bias",
    ("attention_bias", "sinks"): "blk.{}.attn_sinks.weight",
    ("router", "weight"): "blk.{}.ffn_gate_inp.weight",
    ("router_bias", "bias"): "blk.{}.ffn_gate_inp.bias",
    ("selection_bias", "bias"): "blk.{}.exp_probs_b.bias",
    ("expert_gate", "weight"): "blk.{}.ffn_gate_exps.weight",
    ("expert_up", "weight"): "blk.{}.ffn_up_exps.weight",
    ("expert_down", "weight"): "blk.{}.ffn_down_exps.weight",
    ("expert_bias", "gate_bias"): "blk.{}.ffn_gate_exps.bias",
    ("expert_bias", "up_bias"): "blk.{}.ffn_up_exps.bias",
    ("expert_bias", "down_bias"): "blk.{}.ffn_down_exps.bias",
    ("shared_router", "weight"): "blk.{}.ffn_gate_inp_shexp.weight",
    ("shared_gate", "weight"): "blk.{}.ffn_gate_shexp.weight",
    ("shared_up", "weight"): "blk.{}.ffn_up_shexp.weight",
    ("shared_down", "weight"): "blk.{}.ffn_down_shexp.weight",
    ("dense_gate", "weight"): "blk.{}.ffn_gate.weight",
    ("dense_up", "weight"): "blk.{}.ffn_up.weight",
    ("dense_down", "weight"): "blk.{}.ffn_down.weight",
}
_CLASSES = {template.replace("{}", "N"): key[0] for key, template in TENSOR_NAMES.items()}
_CLASSES |= {f"blk.N.{layout.ffn_norm}.weight": "norm" for layout in LAYOUTS.values()}


def gguf_name(tensor_class: TensorClass, part: str, layer: int | None, family: str | None = None) -> str:
    """The GGUF name of a neutral tensor; `family` matters for the norm before the feed-forward block only."""
    if family is not None and (tensor_class, part) == _FFN_NORM:
        return f"blk.{layer}.{LAYOUTS[family].ffn_norm}.weight"
    return TENSOR_NAMES[tensor_class, part].format(layer)


def class_of(name: str) -> TensorClass:
    """The neutral class of a GGUF tensor name.

    Raises:
        InputRejected: the name is in no row of the table.
    """
    generic = re.sub(r"^blk\.\d+\.", "blk.N.", name)
    if generic not in _CLASSES:
        raise InputRejected("a tensor that moe-edge does not know", where=name, why="it was not written by moe-edge")
    return _CLASSES[generic]


def layer_of(name: str) -> int | None:
    """The decoder layer in a GGUF tensor name; None outside the layers."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else None


def check_representable(spec: ModelSpec) -> Capability:
    """What llama.cpp's graph does with this family, once it is known to compute this very model.

    Raises:
        InputRejected: llama.cpp would load the file and compute something else, or not load it; says which and why.
    """
    row = capability("llama_cpp", spec.family)
    reasons = refusals("llama_cpp", spec)
    if reasons or row is None or spec.family not in LAYOUTS:
        raise InputRejected(
            "GGUF cannot represent this model",
            where=f"{spec.family} config.json",
            why="; ".join(reasons) or "no layout for this family",
            next_command="export ONNX instead: --set export.formats=[onnx]",
        )
    return row


def write_hyperparameters(writer: GGUFWriter, spec: ModelSpec) -> None:
    """The architecture's metadata, for a model that `check_representable` admits."""
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.context_length)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.dense_width or spec.moe.expert_width)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    writer.add_vocab_size(spec.vocab)
    _write_attention(writer, spec)
    _write_experts(writer, spec)
    if LAYOUTS[spec.family].multiplies:
        writer.add_embedding_scale(spec.embedding_scale)
        writer.add_attention_scale(spec.attention_scale or spec.head_dim**-0.5)
        writer.add_residual_scale(spec.residual_scale)
        writer.add_logit_scale(spec.logits_divisor)  # the graph divides by it


def _write_attention(writer: GGUFWriter, spec: ModelSpec) -> None:
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    if spec.head_dim * spec.heads != spec.hidden:
        writer.add_key_length(spec.head_dim)
        writer.add_value_length(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_rope_dimension_count(spec.head_dim)
    if "sliding" in spec.layer_kinds and spec.sliding_window:
        writer.add_sliding_window(spec.sliding_window)
    if spec.rope_scaling is not None:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(spec.rope_scaling["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(spec.rope_scaling["original_max_position_embeddings"]))
        writer.add_rope_scaling_yarn_beta_fast(float(spec.rope_scaling.get("beta_fast") or 32.0))
        writer.add_rope_scaling_yarn_beta_slow(float(spec.rope_scaling.get("beta_slow") or 1.0))


def _write_experts(writer: GGUFWriter, spec: ModelSpec) -> None:
    """`expert_gating_func` always, because llama.cpp's defaults differ; a softmax of the chosen is one that is renormalised."""
    moe = spec.moe
    writer.add_expert_count(moe.experts)
    writer.add_expert_used_count(moe.top_k)
    writer.add_expert_gating_func(ExpertGatingFuncType.SOFTMAX)
    writer.add_expert_weights_norm(moe.renormalise)
    if LAYOUTS[spec.family].width_is_expert:
        writer.add_expert_feed_forward_length(moe.expert_width)
    if moe.shared_width:
        writer.add_expert_shared_feed_forward_length(moe.shared_width)
    if LAYOUTS[spec.family].counts_dense:
        writer.add_leading_dense_block_count(len(spec.dense_layers))
        writer.add_interleave_moe_layer_step(1)


def stored_shape(entry: TensorEntry) -> tuple[int, ...]:
    """The shape in the file: the shared expert's gate is a vector there, one row in transformers."""
    return entry.shape[1:] if entry.tensor_class == "shared_router" else entry.shape
