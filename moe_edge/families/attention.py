"""The tensors of a decoder layer apart from its feed-forward block, for every way in which a family mixes tokens.

Grouped-query attention, multi-head latent attention, short convolutions and gated linear attention, with their norms.

Legend: D model, Q query width, KV key/value width.
"""

from collections.abc import Iterator

from moe_edge.contracts.spec import ModelSpec, TensorClass, TensorEntry
from moe_edge.families.declared import Declared


def attention_entries(family: Declared, spec: ModelSpec, layer: int, at: str) -> Iterator[TensorEntry]:
    """Norms and projections of one layer; `at` is its prefix in the checkpoint.

    A bias is class `attention_bias`, part `q_bias`, `k_bias`, `v_bias` or `o_bias`.
    """
    names, kind = family.attention_names, spec.kind_of(layer)
    yield from norm_entries(spec, layer, "input_norm", at + names.input_norm)
    if kind == "conv":
        yield from _convolution(spec, layer, at + "conv.")
    elif kind == "linear":
        yield from _linear_attention(spec, layer, at + "linear_attn.")
    elif spec.latent is not None:
        yield from _latent_attention(spec, layer, at + "self_attn.")
    else:
        yield from _attention(family, spec, layer, at)
    yield from norm_entries(spec, layer, "post_attention_norm", at + names.post_attention_norm)


def norm_entries(spec: ModelSpec, layer: int | None, part: str, module: str) -> Iterator[TensorEntry]:
    """A norm over the hidden state; layer norms have a bias."""
    yield TensorEntry("norm", layer, part, (module + ".weight",), (spec.hidden,))
    if spec.norm == "layer":
        yield TensorEntry("norm", layer, part + "_bias", (module + ".bias",), (spec.hidden,))


def _attention(family: Declared, spec: ModelSpec, layer: int, at: str) -> Iterator[TensorEntry]:
    names, dim = family.attention_names, spec.hidden
    widths = {"q": spec.heads * spec.head_dim, "k": spec.kv_heads * spec.head_dim, "v": spec.kv_heads * spec.head_dim}
    classes: dict[str, TensorClass] = {"q": "attention_q", "k": "attention_k", "v": "attention_v"}
    for letter, width in widths.items():
        rows = 2 * width if letter == "q" and spec.output_gate else width
        name = f"{at}self_attn.{letter}_proj"
        yield TensorEntry(classes[letter], layer, "weight", (name + ".weight",), (rows, dim))
        if spec.attention_bias:
            yield TensorEntry("attention_bias", layer, f"{letter}_bias", (name + ".bias",), (rows,))
    if spec.qk_norm != "none":
        for letter, name in (("q", names.q_norm), ("k", names.k_norm)):
            width = spec.head_dim if spec.qk_norm == "per_head" else widths[letter]
            yield TensorEntry("norm", layer, f"{letter}_norm", (f"{at}{name}.weight",), (width,))
    yield TensorEntry("attention_o", layer, "weight", (f"{at}{names.output}.weight",), (dim, widths["q"]))
    if spec.output_bias:
        yield TensorEntry("attention_bias", layer, "o_bias", (f"{at}{names.output}.bias",), (dim,))
    if spec.sinks:
        yield TensorEntry("attention_bias", layer, "sinks", (at + "self_attn.sinks",), (spec.heads,))


def _latent_attention(spec: ModelSpec, layer: int, at: str) -> Iterator[TensorEntry]:
    """Parts q_a, q_b, kv_a, kv_b of class `attention_other`; without a query latent, q is `attention_q`."""
    latent, dim = spec.latent, spec.hidden
    assert latent is not None
    query = spec.heads * (latent.nope_dim + latent.rope_dim)
    if latent.q_rank is None:
        yield TensorEntry("attention_q", layer, "weight", (at + "q_proj.weight",), (query, dim))
    else:
        yield TensorEntry("attention_other", layer, "q_a", (at + "q_a_proj.weight",), (latent.q_rank, dim))
        yield TensorEntry("norm", layer, "q_a_norm", (at + "q_a_layernorm.weight",), (latent.q_rank,))
        yield TensorEntry("attention_other", layer, "q_b", (at + "q_b_proj.weight",), (query, latent.q_rank))
    kv_a, kv_b = latent.kv_rank + latent.rope_dim, spec.heads * (latent.nope_dim + latent.value_dim)
    yield TensorEntry("attention_other", layer, "kv_a", (at + "kv_a_proj_with_mqa.weight",), (kv_a, dim))
    yield TensorEntry("norm", layer, "kv_a_norm", (at + "kv_a_layernorm.weight",), (latent.kv_rank,))
    yield TensorEntry("attention_other", layer, "kv_b", (at + "kv_b_proj.weight",), (kv_b, latent.kv_rank))
    out = spec.heads * latent.value_dim
    yield TensorEntry("attention_o", layer, "weight", (at + "o_proj.weight",), (dim, out))


def _convolution(spec: ModelSpec, layer: int, at: str) -> Iterator[TensorEntry]:
    dim = spec.hidden
    yield TensorEntry("attention_other", layer, "conv_in", (at + "in_proj.weight",), (3 * dim, dim))
    yield TensorEntry("attention_bias", layer, "conv", (at + "conv.weight",), (dim, 1, spec.mixer["kernel"]))
    yield TensorEntry("attention_other", layer, "conv_out", (at + "out_proj.weight",), (dim, dim))


def _linear_attention(spec: ModelSpec, layer: int, at: str) -> Iterator[TensorEntry]:
    """Gated delta rule (https://arxiv.org/abs/2412.06464): q, k, v share a projection and a convolution."""
    mixer, dim = spec.mixer, spec.hidden
    heads, value = mixer["value_heads"], mixer["value_heads"] * mixer["value_dim"]
    mixed = 2 * mixer["key_heads"] * mixer["key_dim"] + value
    yield TensorEntry("attention_other", layer, "linear_qkv", (at + "in_proj_qkv.weight",), (mixed, dim))
    yield TensorEntry("attention_other", layer, "linear_gate", (at + "in_proj_z.weight",), (value, dim))
    yield TensorEntry("attention_other", layer, "linear_beta", (at + "in_proj_b.weight",), (heads, dim))
    yield TensorEntry("attention_other", layer, "linear_decay", (at + "in_proj_a.weight",), (heads, dim))
    yield TensorEntry("attention_bias", layer, "linear_conv", (at + "conv1d.weight",), (mixed, 1, mixer["kernel"]))
    yield TensorEntry("attention_bias", layer, "decay_rate", (at + "A_log",), (heads,))
    yield TensorEntry("attention_bias", layer, "decay_bias", (at + "dt_bias",), (heads,))
    yield TensorEntry("norm", layer, "linear_norm", (at + "norm.weight",), (mixer["value_dim"],))
    yield TensorEntry("attention_other", layer, "linear_out", (at + "out_proj.weight",), (dim, value))
