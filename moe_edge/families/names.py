"""From checkpoint names to the neutral tensor map, and from a map entry to its numbers.

Checkpoints name experts one by one (`...experts.3.gate_proj.weight`, what every release of transformers saves) or hold
them fused (`...experts.gate_up_proj` of shape (E, 2F, D), gate rows first). Back ends see neither: only (E, F, D).

Legend: E experts, D model, F expert width, FS shared width, V vocabulary, Q query width, KV key/value width.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.spec import EXPERT_CLASSES, ModelSpec, TensorClass, TensorEntry

if TYPE_CHECKING:
    import torch

    from moe_edge.families.base import Family


class Reader(Protocol):
    """Anything that gives a tensor by its checkpoint name (storage.checkpoint.TensorReader)."""

    def get(self, name: str) -> "torch.Tensor": ...


def tensor_entries(family: "Family", spec: ModelSpec, names: Collection[str]) -> list[TensorEntry]:
    """Every tensor of the model in a fixed order: embedding, the layers, final norm, head (unless tied).

    Args:
        names: the checkpoint's tensor names; a mapping name -> object with `.shape` has its shapes checked too.

    Raises:
        InputRejected: a tensor is missing, unknown, or has another shape than the config says.
    """
    present = set(names)
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


def expected_entries(family: "Family", spec: ModelSpec) -> list[TensorEntry]:
    """The map of a checkpoint with per-expert names, from the spec alone."""
    return list(_entries(family, spec, set()))


def _entries(family: "Family", spec: ModelSpec, present: set[str]) -> Iterator[TensorEntry]:
    vocab_shape = (spec.vocab, spec.hidden)
    yield TensorEntry("embedding", None, "weight", ("model.embed_tokens.weight",), vocab_shape)
    for layer in range(spec.layers):
        yield from _attention(spec, layer)
        yield from _block(family, spec, layer, present)
    yield TensorEntry("norm", None, "final_norm", ("model.norm.weight",), (spec.hidden,))
    if not spec.tied_embeddings:
        yield TensorEntry("head", None, "weight", ("lm_head.weight",), vocab_shape)


def _attention(spec: ModelSpec, layer: int) -> Iterator[TensorEntry]:
    """Norms and projections of one layer; a bias is class `attention_bias`, part `q_bias`, `k_bias` or `v_bias`."""
    at = f"model.layers.{layer}."
    dim = spec.hidden
    widths = {"q": spec.heads * spec.head_dim, "k": spec.kv_heads * spec.head_dim, "v": spec.kv_heads * spec.head_dim}
    classes: dict[str, TensorClass] = {"q": "attention_q", "k": "attention_k", "v": "attention_v"}
    yield TensorEntry("norm", layer, "input_norm", (at + "input_layernorm.weight",), (dim,))
    for letter, width in widths.items():
        name = f"{at}self_attn.{letter}_proj"
        yield TensorEntry(classes[letter], layer, "weight", (name + ".weight",), (width, dim))
        if spec.attention_bias:
            yield TensorEntry("attention_bias", layer, f"{letter}_bias", (name + ".bias",), (width,))
    if spec.qk_norm != "none":
        for letter in "qk":
            width = spec.head_dim if spec.qk_norm == "per_head" else widths[letter]
            yield TensorEntry("norm", layer, f"{letter}_norm", (f"{at}self_attn.{letter}_norm.weight",), (width,))
    yield TensorEntry("attention_o", layer, "weight", (at + "self_attn.o_proj.weight",), (dim, widths["q"]))
    yield TensorEntry("norm", layer, "post_attention_norm", (at + "post_attention_layernorm.weight",), (dim,))


def _block(family: "Family", spec: ModelSpec, layer: int, present: set[str]) -> Iterator[TensorEntry]:
    """Router, experts and shared expert of one layer."""
    moe, dim = spec.moe, spec.hidden
    at = f"model.layers.{layer}.{family.block}."
    if at + "gate.weight" not in present and f"model.layers.{layer}.mlp.gate.weight" in present:
        at = f"model.layers.{layer}.mlp."  # in-memory names of transformers 5, where the block is always `mlp`
    yield TensorEntry("router", layer, "weight", (at + "gate.weight",), (moe.experts, dim))
    fused = at + "experts.gate_up_proj" in present
    for tensor_class in EXPERT_CLASSES:
        shape = (moe.experts, moe.expert_width, dim)
        shape = (moe.experts, dim, moe.expert_width) if tensor_class == "expert_down" else shape
        if fused:
            sources: tuple[str, ...] = (at + f"experts.{_FUSED[tensor_class]}",)
        else:
            _refuse_absurd("experts", moe.experts, present)
            part = family.projections[tensor_class]
            sources = tuple(f"{at}experts.{expert}.{part}.weight" for expert in range(moe.experts))
        yield TensorEntry(tensor_class, layer, "weight", sources, shape)
    if family.shared:
        yield from _shared(at, layer, dim, moe.shared_width)


_FUSED: dict[TensorClass, str] = {
    "expert_gate": "gate_up_proj", "expert_up": "gate_up_proj", "expert_down": "down_proj",
}  # fmt: skip


def _shared(at: str, layer: int, dim: int, width: int) -> Iterator[TensorEntry]:
    yield TensorEntry("shared_gate", layer, "weight", (at + "shared_expert.gate_proj.weight",), (width, dim))
    yield TensorEntry("shared_up", layer, "weight", (at + "shared_expert.up_proj.weight",), (width, dim))
    yield TensorEntry("shared_down", layer, "weight", (at + "shared_expert.down_proj.weight",), (dim, width))
    yield TensorEntry("shared_router", layer, "weight", (at + "shared_expert_gate.weight",), (1, dim))


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
    expected = entry.shape
    if entry.tensor_class in EXPERT_CLASSES:
        expected = fused_shape(entry) if is_fused(entry) else entry.shape[1:]
    for source in entry.sources:
        actual = tuple(infos[source].shape)
        if actual != expected:
            why = f"config.json implies shape {expected}, the file has {actual}"
            raise InputRejected("a tensor contradicts config.json", where=source, why=why)


def is_fused(entry: TensorEntry) -> bool:
    """Does the checkpoint hold this expert tensor as one fused 3-D tensor?"""
    return entry.sources[0].endswith(("experts.gate_up_proj", "experts.down_proj"))


def fused_shape(entry: TensorEntry) -> tuple[int, ...]:
    """Shape of the fused source: (E, 2F, D) for gate and up, (E, D, F) for down."""
    experts, rows, columns = entry.shape
    return (experts, rows, columns) if entry.tensor_class == "expert_down" else (experts, 2 * rows, columns)


def assemble(entry: TensorEntry, reader: Reader) -> "torch.Tensor":
    """The numbers of one neutral tensor, shape `entry.shape`, in the checkpoint's dtype."""
    import torch

    if entry.tensor_class not in EXPERT_CLASSES:
        return reader.get(entry.sources[0])
    if not is_fused(entry):
        return torch.stack([reader.get(source) for source in entry.sources])
    fused = reader.get(entry.sources[0])
    if entry.tensor_class == "expert_down":
        return fused
    width = entry.shape[1]
    return fused[:, :width] if entry.tensor_class == "expert_gate" else fused[:, width:]
