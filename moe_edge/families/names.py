"""From checkpoint names to the neutral tensor map.

Checkpoints name experts one by one (`...experts.3.gate_proj.weight`, what most releases of transformers save) or hold
them fused (`...experts.gate_up_proj` of shape (E, 2F, D), gate rows first or alternating, plain or transposed). Back ends
see neither: only (E, F, D).

Legend: E experts, D model, F expert width, FS shared width, V vocabulary.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.spec import EXPERT_OWNED, Layout, ModelSpec, TensorClass, TensorEntry
from moe_edge.families.attention import attention_entries, norm_entries
from moe_edge.families.declared import Declared, Names


def tensor_entries(
    family: Declared, spec: ModelSpec, names: Collection[str], skipped: tuple[str, ...] = ()
) -> list[TensorEntry]:
    """Every tensor of the model in a fixed order: embedding, the layers, final norm, head (unless tied).

    Args:
        names: the checkpoint's tensor names; a mapping name -> object with `.shape` has its shapes checked too.
        skipped: prefixes of tensors that do not belong to the language model.

    Raises:
        InputRejected: a tensor is missing, unknown, or has another shape than the config says.
    """
    present = {name for name in names if not name.startswith(skipped)}
    if not present:
        raise InputRejected("the checkpoint lacks tensors", why="it holds none")
    _refuse_absurd("layers", spec.layers, present)
    entries = list(_entries(family, spec, present))
    used = {source for entry in entries for source in entry.sources}
    _check_complete(used, present, spec.tied_embeddings)
    if isinstance(names, Mapping):
        for entry in entries:
            _check_shapes(entry, names)
    return entries


def expected_entries(family: Declared, spec: ModelSpec) -> list[TensorEntry]:
    """The map of a checkpoint as transformers saves it, from the spec alone."""
    return list(_entries(family, spec, set()))


def _entries(family: Declared, spec: ModelSpec, present: set[str]) -> Iterator[TensorEntry]:
    vocab_shape = (spec.vocab, spec.hidden)
    body = _prefix(family, present)
    dense = set(spec.dense_layers)
    yield TensorEntry("embedding", None, "weight", (body + "embed_tokens.weight",), vocab_shape)
    for layer in range(spec.layers):
        at = f"{body}layers.{layer}."
        yield from attention_entries(family, spec, layer, at)
        yield from _dense(family, spec, layer, at) if layer in dense else _block(family, spec, layer, at, present)
    yield from norm_entries(spec, None, "final_norm", body + family.attention_names.final_norm)
    if not spec.tied_embeddings:
        yield TensorEntry("head", None, "weight", ("lm_head.weight",), vocab_shape)
    if spec.head_bias:
        yield TensorEntry("head_bias", None, "bias", ("lm_head.bias",), (spec.vocab,))


def _prefix(family: Declared, present: set[str]) -> str:
    """Of the language model's tensors: the first of the family's prefixes that the checkpoint has."""
    found = (prefix for prefix in family.prefixes if any(name.startswith(prefix) for name in present))
    return next(found, family.prefixes[-1])


def _dense(family: Declared, spec: ModelSpec, layer: int, at: str) -> Iterator[TensorEntry]:
    names, width, dim = family.saved, spec.dense_width, spec.hidden
    block = f"{at}{names.block}."
    yield TensorEntry("dense_gate", layer, "weight", (f"{block}{names.gate}.weight",), (width, dim))
    yield TensorEntry("dense_up", layer, "weight", (f"{block}{names.up}.weight",), (width, dim))
    yield TensorEntry("dense_down", layer, "weight", (f"{block}{names.down}.weight",), (dim, width))


def _block(family: Declared, spec: ModelSpec, layer: int, at: str, present: set[str]) -> Iterator[TensorEntry]:
    """Router, experts and shared expert of one layer."""
    moe, dim = spec.moe, spec.hidden
    names = _style(family, at, present)
    block = f"{at}{names.block}."
    router = f"{block}{names.router}."
    yield TensorEntry("router", layer, "weight", (router + names.weight,), (moe.experts, dim))
    if moe.router_bias:
        yield TensorEntry("router_bias", layer, "bias", (router + "bias",), (moe.experts,))
    if moe.selection_bias:
        yield TensorEntry("selection_bias", layer, "bias", (block + names.selection_bias,), (moe.experts,))
    if not names.per_expert or block + names.fused_gate_up in present:
        yield from _fused_experts(family, spec, layer, block, names)
    else:
        _refuse_absurd("experts", moe.experts, present)
        yield from _experts(spec, layer, block, names)
    if moe.shared_width:
        yield from _shared(spec, layer, at, names)


def _style(family: Declared, at: str, present: set[str]) -> Names:
    """The names of a saved checkpoint, unless this one has those of the loaded model."""
    for names in (family.saved, family.in_memory):
        fixed = [f"{names.router}.{names.weight}", *([names.selection_bias] if names.selection_bias else [])]
        if all(f"{at}{names.block}.{name}" in present for name in fixed):
            return names
    return family.saved


def _experts(spec: ModelSpec, layer: int, block: str, names: Names) -> Iterator[TensorEntry]:
    """Experts that the checkpoint names one by one."""
    experts, width, dim = spec.moe.experts, spec.moe.expert_width, spec.hidden
    parts: tuple[tuple[TensorClass, str, tuple[int, ...]], ...] = (
        ("expert_gate", names.gate, (experts, width, dim)),
        ("expert_up", names.up, (experts, width, dim)),
        ("expert_down", names.down, (experts, dim, width)),
    )
    for tensor_class, part, shape in parts:
        sources = tuple(f"{block}experts.{expert}.{part}.weight" for expert in range(experts))
        yield TensorEntry(tensor_class, layer, "weight", sources, shape, "per_expert")


def _fused_experts(family: Declared, spec: ModelSpec, layer: int, block: str, names: Names) -> Iterator[TensorEntry]:
    """Experts stacked in two tensors, with their biases where the family has some."""
    experts, width, dim = spec.moe.experts, spec.moe.expert_width, spec.hidden
    gate: Layout = "even" if family.interleaved else "first_half"
    up: Layout = "odd" if family.interleaved else "second_half"
    flip = family.interleaved
    gate_up, down = (block + names.fused_gate_up,), (block + names.fused_down,)
    yield TensorEntry("expert_gate", layer, "weight", gate_up, (experts, width, dim), gate, flip)
    yield TensorEntry("expert_up", layer, "weight", gate_up, (experts, width, dim), up, flip)
    yield TensorEntry("expert_down", layer, "weight", down, (experts, dim, width), "whole", flip)
    if spec.moe.expert_biases:
        gate_up, down = (gate_up[0] + "_bias",), (down[0] + "_bias",)
        yield TensorEntry("expert_bias", layer, "gate_bias", gate_up, (experts, width), gate)
        yield TensorEntry("expert_bias", layer, "up_bias", gate_up, (experts, width), up)
        yield TensorEntry("expert_bias", layer, "down_bias", down, (experts, dim))


def _shared(spec: ModelSpec, layer: int, at: str, names: Names) -> Iterator[TensorEntry]:
    width, dim = spec.moe.shared_width, spec.hidden
    base = f"{at}{names.shared}."
    gate, up, down = (f"{base}{part}.weight" for part in (names.gate, names.up, names.down))
    layouts: tuple[Layout, Layout] = ("whole", "whole")
    if names.shared_gate_up:
        gate = up = base + names.shared_gate_up
        down, layouts = base + names.shared_down, ("first_half", "second_half")
    yield TensorEntry("shared_gate", layer, "weight", (gate,), (width, dim), layouts[0])
    yield TensorEntry("shared_up", layer, "weight", (up,), (width, dim), layouts[1])
    yield TensorEntry("shared_down", layer, "weight", (down,), (dim, width))
    if spec.moe.shared_gated:
        yield TensorEntry("shared_router", layer, "weight", (f"{at}{names.shared_router}.weight",), (1, dim))


def _refuse_absurd(what: str, count: int, present: set[str]) -> None:
    """Refuse a count above the number of tensors before names are made up for it; an empty `present` means unknown."""
    if present and count > len(present):
        why = f"config.json declares {count} {what}, there are {len(present)} tensors"
        raise InputRejected("the checkpoint lacks tensors", why=why)


def _check_complete(used: set[str], present: set[str], tied: bool) -> None:
    ignored = {name for name in present if name.endswith("rotary_emb.inv_freq")}
    ignored |= {"lm_head.weight"} if tied else set()
    for problem, names in (("lacks", used - present), ("holds unknown", present - used - ignored)):
        if names:
            shown = ", ".join(sorted(names)[:3])
            why = f"{len(names)} tensors, first: {shown}; the names follow from config.json"
            raise InputRejected(f"the checkpoint {problem} tensors", why=why)


def _check_shapes(entry: TensorEntry, infos: Mapping[str, Any]) -> None:
    expected = source_shape(entry)
    for source in entry.sources:
        actual = tuple(infos[source].shape)
        same_row = entry.tensor_class == "selection_bias" and actual == (1, *expected)  # one row per group of experts
        if actual != expected and not same_row:
            why = f"config.json implies shape {expected}, the file has {actual}"
            raise InputRejected("a tensor contradicts config.json", where=source, why=why)


def source_shape(entry: TensorEntry) -> tuple[int, ...]:
    """Shape of each source in the checkpoint, as (E, 2F, D) of a fused gate and up."""
    shape = list(entry.shape)
    if entry.layout == "per_expert":
        return tuple(shape[1:])
    if entry.layout != "whole":
        shape[halved_axis(entry)] *= 2
    if entry.transposed:
        shape[-2], shape[-1] = shape[-1], shape[-2]
    return tuple(shape)


def halved_axis(entry: TensorEntry) -> int:
    """The axis on which a source holds gate and up: the first after that of the experts."""
    return 1 if entry.tensor_class in EXPERT_OWNED else 0
