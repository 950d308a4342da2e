"""How each family looks inside a GGUF file: architecture, tensor names and metadata, as data.

What: `ARCHITECTURES` (family -> what llama.cpp hard-codes for it), `TENSOR_NAMES` (neutral tensor -> GGUF name) and the
checks that refuse a model which the architecture would silently compute differently. A new family is one row.
Facts: llama.cpp src/models/{llama,qwen2moe,qwen3moe,olmoe}.cpp. Legend: D model width, F expert width.
"""

import re
from dataclasses import dataclass

from gguf import ExpertGatingFuncType, GGUFWriter

from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.spec import ModelSpec, TensorClass, TensorEntry


@dataclass(frozen=True)
class Architecture:
    """What a GGUF architecture of llama.cpp fixes in code, so that the file cannot change it."""

    name: str
    renormalises: bool  # its graph divides the top-k weights by their sum
    needs_output: bool  # refuses a file without output.weight, even for tied embeddings
    width_is_expert: bool  # reads F from expert_feed_forward_length; otherwise from feed_forward_length
    permutes_rope: bool  # rotates neighbouring pairs: rows of q and k must be interleaved
    square_attention: bool  # heads * head_dim must be D
    equal_heads: bool = False  # every head must have its own key and value


ARCHITECTURES: dict[str, Architecture] = {
    "mixtral": Architecture("llama", True, False, False, permutes_rope=True, square_attention=False),
    "qwen2_moe": Architecture("qwen2moe", False, True, True, permutes_rope=False, square_attention=True),
    "qwen3_moe": Architecture("qwen3moe", True, False, True, permutes_rope=False, square_attention=False),
    "olmoe": Architecture("olmoe", False, True, False, permutes_rope=False, square_attention=True, equal_heads=True),
}

# (class, part) -> name; {} is the layer
TENSOR_NAMES: dict[tuple[TensorClass, str], str] = {
    ("embedding", "weight"): "token_embd.weight",
    ("norm", "final_norm"): "output_norm.weight",
    ("head", "weight"): "output.weight",
    ("norm", "input_norm"): "blk.{}.attn_norm.weight",
    ("norm", "q_norm"): "blk.{}.attn_q_norm.weight",
    ("norm", "k_norm"): "blk.{}.attn_k_norm.weight",
    ("norm", "post_attention_norm"): "blk.{}.ffn_norm.weight",
    ("attention_q", "weight"): "blk.{}.attn_q.weight",
    ("attention_k", "weight"): "blk.{}.attn_k.weight",
    ("attention_v", "weight"): "blk.{}.attn_v.weight",
    ("attention_o", "weight"): "blk.{}.attn_output.weight",
    ("attention_bias", "q_bias"): "blk.{}.attn_q.bias",
    ("attention_bias", "k_bias"): "blk.{}.attn_k.bias",
    ("attention_bias", "v_bias"): "blk.{}.attn_v.bias",
    ("router", "weight"): "blk.{}.ffn_gate_inp.weight",
    ("expert_gate", "weight"): "blk.{}.ffn_gate_exps.weight",
    ("expert_up", "weight"): "blk.{}.ffn_up_exps.weight",
    ("expert_down", "weight"): "blk.{}.ffn_down_exps.weight",
    ("shared_router", "weight"): "blk.{}.ffn_gate_inp_shexp.weight",
    ("shared_gate", "weight"): "blk.{}.ffn_gate_shexp.weight",
    ("shared_up", "weight"): "blk.{}.ffn_up_shexp.weight",
    ("shared_down", "weight"): "blk.{}.ffn_down_shexp.weight",
}
_CLASSES = {template.replace("{}", "N"): key[0] for key, template in TENSOR_NAMES.items()}


def gguf_name(tensor_class: TensorClass, part: str, layer: int | None) -> str:
    """The GGUF name of a neutral tensor."""
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


def writes_output_twice(spec: ModelSpec) -> bool:
    """Must the embedding be stored a second time as output.weight, because the architecture knows no tied head?"""
    return spec.tied_embeddings and architecture_of(spec).needs_output


def architecture_of(spec: ModelSpec) -> Architecture:
    """The row of a family.

    Raises:
        InputRejected: GGUF export does not know the family.
    """
    if spec.family not in ARCHITECTURES:
        raise InputRejected(f"no GGUF export for '{spec.family}'", why=f"supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[spec.family]


def check_representable(spec: ModelSpec) -> Architecture:
    """The architecture of a model that llama.cpp will compute exactly as transformers does.

    Raises:
        InputRejected: llama.cpp would load the file and compute something else, or not load it; says which and why.
    """
    arch = architecture_of(spec)
    reasons = [reason for wrong, reason in _mismatches(spec, arch) if wrong]
    if reasons:
        raise InputRejected(
            f"llama.cpp's architecture '{arch.name}' cannot represent this model",
            where=f"{spec.family} config.json",
            why="; ".join(reasons),
            next_command="export ONNX instead: --set export.formats=[onnx]",
        )
    return arch


def _mismatches(spec: ModelSpec, arch: Architecture) -> list[tuple[bool, str]]:
    moe = spec.moe
    does, wants = ("does", "does not") if arch.renormalises else ("does not", "does")
    width = spec.heads * spec.head_dim
    return [
        (moe.renormalise != arch.renormalises, f"it {does} renormalise the top-k weights, the model {wants} (norm_topk_prob)"),
        (spec.clip_qkv is not None, f"it ignores clip_qkv={spec.clip_qkv}"),
        (
            spec.sliding_window is not None and spec.sliding_window < spec.context_length,
            f"it ignores the sliding window of {spec.sliding_window} (max_position_embeddings {spec.context_length})",
        ),
        (arch.square_attention and width != spec.hidden, f"it needs heads x head_dim = {width} to be {spec.hidden}"),
        (arch.equal_heads and spec.kv_heads != spec.heads, f"it needs {spec.heads} key-value heads, found {spec.kv_heads}"),
        (spec.family == "qwen2_moe" and not moe.shared_width, "it needs a shared expert"),
        (moe.experts > 1024, f"it allows 1024 experts, found {moe.experts}"),
    ]


def write_hyperparameters(writer: GGUFWriter, spec: ModelSpec, arch: Architecture) -> None:
    """The architecture's metadata; `expert_gating_func` always, because llama.cpp's default differs between families."""
    moe = spec.moe
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.context_length)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(moe.expert_width)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_vocab_size(spec.vocab)
    if spec.head_dim * spec.heads != spec.hidden:
        writer.add_key_length(spec.head_dim)
        writer.add_value_length(spec.head_dim)
    writer.add_expert_count(moe.experts)
    writer.add_expert_used_count(moe.top_k)
    writer.add_expert_gating_func(ExpertGatingFuncType.SOFTMAX)
    writer.add_expert_weights_norm(moe.renormalise)
    if arch.width_is_expert:
        writer.add_expert_feed_forward_length(moe.expert_width)
    if moe.shared_width:
        writer.add_expert_shared_feed_forward_length(moe.shared_width)


def stored_shape(entry: TensorEntry) -> tuple[int, ...]:
    """The shape in the file: the shared expert's gate is a vector there, one row in transformers."""
    return entry.shape[1:] if entry.tensor_class == "shared_router" else entry.shape
