"""Where llama.cpp wants numbers in another order or another form than transformers: pure functions of arrays.

What: `conversion` gives the function for one tensor of a family. Three things differ: the rows of q and k that rotate (pairs
instead of halves), norms whose gain is one plus the weight (llama.cpp multiplies by the gain), and linear attention, whose
value heads transformers groups by key head and llama.cpp deals out in turn, and whose decay is stored as -exp(A). Llama 3's
scaled rotation, which transformers computes from config.json, is a tensor of divisors.
Legend: D model width, H heads.
"""

from collections.abc import Callable

import numpy as np

from moe_edge.contracts.rotary_scaling import llama3_divisors
from moe_edge.contracts.spec import ModelSpec, TensorEntry

Convert = Callable[[np.ndarray], np.ndarray]


def conversion(entry: TensorEntry, spec: ModelSpec, rotates_pairs: bool) -> Convert:
    """From the checkpoint's numbers, shape `entry.shape`, to those of the file.

    Args:
        rotates_pairs: does the graph rotate neighbouring columns of a head together?
    """
    if entry.part == "rotary_divisors":
        return lambda values: np.asarray(_rotary_divisors(spec), dtype=values.dtype)
    rotation = _rotation(entry, spec) if rotates_pairs and not spec.paired_rotary else None
    if rotation is not None:
        return rotation
    if spec.norm == "rms_around_one" and entry.tensor_class == "norm" and entry.part != "linear_norm":
        return lambda values: values + 1
    if entry.part in _TILED:
        return lambda values: _TILED[entry.part](values, spec)
    return lambda values: values


def _rotary_divisors(spec: ModelSpec) -> list[float]:
    assert spec.rope_scaling is not None
    return llama3_divisors(spec.rope_scaling, spec.rotary_dim, spec.rope_theta)


def interleave_rope(weight: np.ndarray, heads: int, kept: int = 0) -> np.ndarray:
    """Rows of a q or k projection from transformers' half-split order to llama.cpp's neighbouring pairs.

    Per head, after the first `kept` rows that do not rotate, row j of the first half and row j of the second half (the two
    parts of one rotation) become neighbours.
    """
    per_head = weight.reshape(heads, -1, *weight.shape[1:])
    still, turning = per_head[:, :kept], per_head[:, kept:]
    pairs = turning.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(turning.shape)
    return np.concatenate([still, pairs], axis=1).reshape(weight.shape)


def _rotation(entry: TensorEntry, spec: ModelSpec) -> Convert | None:
    """The reordering of the rows of q and k that rotate; None where none does."""
    key, kept = (entry.tensor_class, entry.part), spec.latent.nope_dim if spec.latent else 0
    if key in (("attention_q", "weight"), ("attention_bias", "q_bias"), ("attention_other", "q_b")):
        return lambda values: interleave_rope(values, spec.heads, kept)
    if key in (("attention_k", "weight"), ("attention_bias", "k_bias")):
        return lambda values: interleave_rope(values, spec.kv_heads)
    if key == ("attention_other", "kv_a") and spec.latent:
        rank = spec.latent.kv_rank
        return lambda values: interleave_rope(values, 1, rank)
    return None


def latent_keys(kv_b: np.ndarray, spec: ModelSpec) -> np.ndarray:
    """The part of the latent's expansion that makes keys, [H, rank, columns of a key]."""
    assert spec.latent is not None
    return kv_b.reshape(spec.heads, -1, spec.latent.kv_rank)[:, : spec.latent.nope_dim].swapaxes(1, 2)


def latent_values(kv_b: np.ndarray, spec: ModelSpec) -> np.ndarray:
    """The part that makes values, [H, columns of a value, rank]."""
    assert spec.latent is not None
    return kv_b.reshape(spec.heads, -1, spec.latent.kv_rank)[:, spec.latent.nope_dim :]


def tile_value_heads(values: np.ndarray, spec: ModelSpec) -> np.ndarray:
    """Value heads along the first axis: from [key head, which of its value heads] to [which, key head]."""
    mixer = spec.mixer
    grouped = values.reshape(mixer["key_heads"], mixer["value_heads"] // mixer["key_heads"], -1)
    return grouped.swapaxes(0, 1).reshape(values.shape)


def _after_keys(values: np.ndarray, spec: ModelSpec) -> np.ndarray:
    """Rows of q and k stay, those of v are tiled."""
    first = 2 * spec.mixer["key_heads"] * spec.mixer["key_dim"]
    return np.concatenate([values[:first], tile_value_heads(values[first:], spec)])


# part -> conversion of a tensor of linear attention
_TILED: dict[str, Callable[[np.ndarray, ModelSpec], np.ndarray]] = {
    "linear_qkv": _after_keys,
    "linear_conv": _after_keys,
    "linear_gate": tile_value_heads,
    "linear_beta": tile_value_heads,
    "linear_decay": tile_value_heads,
    "decay_bias": tile_value_heads,
    "decay_rate": lambda values, spec: -np.exp(tile_value_heads(values, spec)),
    "linear_out": lambda values, spec: tile_value_heads(np.ascontiguousarray(values.T), spec).T,
}
