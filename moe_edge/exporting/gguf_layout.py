"""How each family looks inside a GGUF file: tensor names, shapes and row orders, as data.

What: `LAYOUTS` (family -> how its file differs), `TENSOR_NAMES` (neutral tensor -> GGUF name), `stored_tensors` (what a
checkpoint's tensor becomes), and the refusal of a model that llama.cpp would silently compute differently
(contracts/capability_table.py). A new family is one row in each table; its metadata is in gguf_hyperparameters.py.
Facts: llama.cpp src/models/*.cpp.
Legend: D model width, F expert width, H heads, R rank of the latent.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from gguf import GGUFWriter

from moe_edge.contracts.capabilities import capability, refusals, stored_shapes
from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.spec import ModelSpec, TensorClass, TensorEntry
from moe_edge.exporting import gguf_hyperparameters as write
from moe_edge.exporting.gguf_reorder import Convert, conversion, latent_keys, latent_values

Key = tuple[TensorClass, str]  # class and part of a neutral tensor


@dataclass(frozen=True)
class Layout:
    """How the file of one family differs from its sisters'; what the graph computes is in contracts/capability_table.py."""

    writes: tuple[Callable[[GGUFWriter, ModelSpec], None], ...] = ()  # metadata beside what every file has
    rotates_pairs: bool = False  # neighbouring rows of q and k; rows of a model that rotates halves are interleaved
    names: Mapping[Key, str] = field(default_factory=dict)  # that differ from TENSOR_NAMES


_AFTER_ATTENTION: dict[Key, str] = {("norm", "post_attention_norm"): "blk.{}.post_attention_norm.weight"}
_DEEPSEEK2 = Layout(
    (write.latent_attention, write.expert_width, write.shared_count, write.leading_dense), rotates_pairs=True
)
_GRANITE = Layout((write.shared_width, write.multipliers), rotates_pairs=True)
LAYOUTS: dict[str, Layout] = {
    "mixtral": Layout(rotates_pairs=True),
    "qwen2_moe": Layout((write.expert_width, write.shared_width)),
    "qwen3_moe": Layout((write.expert_width,)),
    "olmoe": Layout(),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "ernie4_5_moe": Layout(
        (write.expert_width, write.shared_width, write.leading_dense, write.every_layer), rotates_pairs=True
    ),
    "gpt_oss": Layout((write.expert_width,), names=_AFTER_ATTENTION),
    "deepseek_v2": _DEEPSEEK2,
    "deepseek_v3": _DEEPSEEK2,
    "glm4_moe_lite": _DEEPSEEK2,
    "glm4_moe": Layout((write.expert_width, write.shared_count, write.leading_dense), names=_AFTER_ATTENTION),
    "lfm2_moe": Layout(
        (write.expert_width, write.leading_dense, write.convolutions),
        names={("norm", "final_norm"): "token_embd_norm.weight"},
    ),
    "minimax_m2": Layout((write.expert_width,)),
    "hunyuan_v1_moe": Layout((write.expert_width, write.shared_width)),
    "qwen3_5_moe": Layout((write.expert_width, write.shared_width, write.linear_attention), names=_AFTER_ATTENTION),
    "qwen3": Layout(),
    "qwen2": Layout(),
    "mistral": Layout(rotates_pairs=True),
    "llama": Layout(rotates_pairs=True),
    "granite": Layout((write.multipliers,), rotates_pairs=True),
}

# (class, part) -> name; {} is the layer
TENSOR_NAMES: dict[Key, str] = {
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
    ("attention_bias", "o_bias"): "blk.{}.attn_output.bias",
    ("attention_bias", "sinks"): "blk.{}.attn_sinks.weight",
    ("attention_bias", "rotary_divisors"): "rope_freqs.weight",
    ("norm", "q_a_norm"): "blk.{}.attn_q_a_norm.weight",
    ("norm", "kv_a_norm"): "blk.{}.attn_kv_a_norm.weight",
    ("attention_other", "q_a"): "blk.{}.attn_q_a.weight",
    ("attention_other", "q_b"): "blk.{}.attn_q_b.weight",
    ("attention_other", "kv_a"): "blk.{}.attn_kv_a_mqa.weight",
    ("attention_other", "k_b"): "blk.{}.attn_k_b.weight",
    ("attention_other", "v_b"): "blk.{}.attn_v_b.weight",
    ("attention_other", "conv_in"): "blk.{}.shortconv.in_proj.weight",
    ("attention_bias", "conv"): "blk.{}.shortconv.conv.weight",
    ("attention_other", "conv_out"): "blk.{}.shortconv.out_proj.weight",
    ("attention_other", "linear_qkv"): "blk.{}.attn_qkv.weight",
    ("attention_other", "linear_gate"): "blk.{}.attn_gate.weight",
    ("attention_other", "linear_beta"): "blk.{}.ssm_beta.weight",
    ("attention_other", "linear_decay"): "blk.{}.ssm_alpha.weight",
    ("attention_other", "linear_out"): "blk.{}.ssm_out.weight",
    ("attention_bias", "linear_conv"): "blk.{}.ssm_conv1d.weight",
    ("attention_bias", "decay_rate"): "blk.{}.ssm_a",
    ("attention_bias", "decay_bias"): "blk.{}.ssm_dt.bias",
    ("norm", "linear_norm"): "blk.{}.ssm_norm.weight",
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
_GENERIC = {key: template.replace("{}", "N") for key, template in TENSOR_NAMES.items()}
_CLASSES = {name: key[0] for key, name in _GENERIC.items()}
_CLASSES |= {
    template.replace("{}", "N"): key[0] for layout in LAYOUTS.values() for key, template in layout.names.items()
}


def gguf_name(tensor_class: TensorClass, part: str, layer: int | None, family: str) -> str:
    """The GGUF name of a neutral tensor of a family; of one without a layout what most files call it."""
    key = (tensor_class, part)
    return LAYOUTS.get(family, Layout()).names.get(key, TENSOR_NAMES[key]).format(layer)


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


def architecture_of(spec: ModelSpec) -> str:
    """llama.cpp's architecture of a family, once its graph is known to compute this very model.

    Raises:
        InputRejected: llama.cpp would load the file and compute something else, or not load it; says which and why.
    """
    row, reasons = capability("llama_cpp", spec.family), refusals("llama_cpp", spec)
    if reasons or row is None or spec.family not in LAYOUTS:
        raise InputRejected(
            "GGUF cannot represent this model",
            where=f"{spec.family} config.json",
            why="; ".join(reasons) or "no layout for this family",
            next_command="export ONNX instead: --set export.formats=[onnx]",
        )
    return row.architecture


def file_entries(entries: list[TensorEntry], spec: ModelSpec) -> list[TensorEntry]:
    """The entries in file order, and what the architecture wants beside them: the embedding again as head where it demands
    an output.weight, and Llama 3's divisors of the frequencies, which no checkpoint holds and so have no sources.
    """
    row, more = capability("llama_cpp", spec.family), []
    if spec.tied_embeddings and row is not None and not row.tied_head:
        embedding = next(entry for entry in entries if entry.tensor_class == "embedding")
        more.append(replace(embedding, tensor_class="head"))
    if spec.rope_scaling is not None and spec.rope_scaling["rope_type"] == "llama3":
        more.append(TensorEntry("attention_bias", None, "rotary_divisors", (), (spec.rotary_dim // 2,)))
    return [*entries, *more]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file and how its numbers come from the checkpoint's tensor."""

    entry: TensorEntry
    name: str
    shape: tuple[int, ...]
    convert: Convert  # from shape `entry.shape`


def stored_tensors(entry: TensorEntry, spec: ModelSpec) -> list[StoredTensor]:
    """What one tensor of the checkpoint becomes: itself, reordered or reshaped, or the two parts of `kv_b`."""
    shapes = stored_shapes("llama_cpp", spec, entry.part, entry.shape)
    if len(shapes) == 2:
        halves = zip(("k_b", "v_b"), shapes, (latent_keys, latent_values), strict=True)
        return [_stored(entry, spec, part, shape, partial(half, spec=spec)) for part, shape, half in halves]
    squeezed = entry.tensor_class == "shared_router" or entry.part in ("conv", "linear_conv")  # [1, D], [D, 1, taps]
    shape = tuple(size for size in entry.shape if size != 1 or not squeezed)
    return [_stored(entry, spec, entry.part, shape, conversion(entry, spec, LAYOUTS[spec.family].rotates_pairs))]


def _stored(entry: TensorEntry, spec: ModelSpec, part: str, shape: tuple[int, ...], convert: Convert) -> StoredTensor:
    return StoredTensor(entry, gguf_name(entry.tensor_class, part, entry.layer, spec.family), shape, convert)
