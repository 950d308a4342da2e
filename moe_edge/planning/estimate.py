"""What a student will weigh, need and reach, from headers alone: file bytes, memory, decode speed.

File bytes are exact for GGUF and ONNX tensors, because the exporters take types and bits from the same tables
(contracts/quantization.py, contracts/onnx_bits.py); runtime buffers are assumptions, named below. Decoding one token reads
every weight it uses once, so speed is at most bandwidth x efficiency / bytes read (a roofline): dropping experts shrinks the
file and leaves that number as it is, unless top-k or the expert width falls too.

Units: bytes, tokens per second.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal, NamedTuple

from moe_edge.contracts import onnx_bits
from moe_edge.contracts.capabilities import RUNTIME_OF_FORMAT, capability, stored_shapes
from moe_edge.contracts.plan import Estimate
from moe_edge.contracts.quantization import pinned_type, tensor_bytes
from moe_edge.contracts.spec import EXPERT_OWNED, ModelSpec, TensorClass
from moe_edge.contracts.target import Fact, Target
from moe_edge.planning.headers import Group, ModelHeaders
from moe_edge.process.limits import total_memory_bytes

GGUF_ALIGNMENT = 32  # every tensor starts at a multiple of this
GGUF_TENSOR_RECORD_BYTES = 96  # name, shape, type and offset of a tensor
GGUF_HEADER_BYTES = 16_384  # hyperparameters, chat template, provenance
ONNX_GRAPH_BYTES = 1 << 20
# Assumptions about a runtime besides weights and KV cache: the process itself, and logits and activations of one batch.
PROCESS_BYTES = 64 << 20
BATCH_TOKENS = 512
# ONNX Runtime keeps a prepacked copy of quantized experts (measured).
RESIDENT_PER_FILE_BYTE = {"gguf": 1.0, "onnx": 1.5}
# (format, precision of keys and values) -> bytes per value; our ONNX graphs compute and cache in float32
KV_BYTES = {("gguf", "f16"): 2.0, ("gguf", "q8_0"): 34 / 32, ("onnx", "f16"): 4.0}
KvPrecision = Literal["f16", "q8_0"]


class Packing(NamedTuple):
    """How the weights of a file are stored: a GGUF recipe, or an ONNX precision with its block size.

    `mix` replaces the recipe's types (contracts/quantization.py), or the precision's bits (contracts/onnx_bits.py), per
    class and range of layers.
    """

    format: Literal["gguf", "onnx"]
    name: str
    block: int = 32
    mix: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """'Q4_K_M', or 'Q4_K_M-mix' where a plan replaced types."""
        return f"{self.name}-mix" if self.mix else self.name


class Cache(NamedTuple):
    """The KV cache that is planned for."""

    context_length: int  # tokens
    precision: KvPrecision = "f16"


@dataclass(frozen=True)
class Machine:
    """The target's hardware as numbers; None = unknown."""

    memory_bytes: int | None
    usable_bytes: int | None
    bandwidth_bytes_per_s: float | None  # that decoding reaches


def machine_of(target: Target) -> Machine:
    """The target's constants; a null memory is the host's when the target's device is this host."""
    hardware = target.hardware
    memory = _number(hardware.memory_bytes)
    if memory is None and target.device == "local":
        memory = float(total_memory_bytes())
    share, bandwidth = _number(hardware.usable_share), _number(hardware.bandwidth_gb_per_s)
    efficiency = _number(hardware.bandwidth_efficiency)
    return Machine(
        memory_bytes=None if memory is None else int(memory),
        usable_bytes=None if memory is None or share is None else int(memory * share),
        bandwidth_bytes_per_s=None if bandwidth is None or efficiency is None else bandwidth * efficiency * 1e9,
    )


def _number(fact: Fact) -> float | None:
    return fact.value if isinstance(fact.value, float) else None


def stored_groups(model: ModelHeaders, experts: int, packing: Packing, width: int | None = None) -> tuple[Group, ...]:
    """The tensors that the file holds; a tied head is one of them where the runtime demands it."""
    spec, runtime = model.spec, RUNTIME_OF_FORMAT[packing.format]
    groups = [
        group._replace(shape=shape)
        for group in model.with_experts(experts, width)
        for shape in stored_shapes(runtime, spec, group.part, group.shape)
    ]
    row = capability(runtime, spec.family)
    writes_head = spec.tied_embeddings and row is not None and not row.tied_head
    extra = (Group("head", (spec.vocab, spec.hidden), 1, None),) if writes_head else ()
    return (*_as_stored(groups, packing, spec.tied_embeddings), *extra)


def stored_bytes(packing: Packing, tensor_class: TensorClass, shape: tuple[int, ...], layer: int | None = None) -> int:
    """Bytes of one tensor's data."""
    if packing.format == "gguf":
        kind = pinned_type(packing.name, tensor_class, shape[-1], layer, dict(packing.mix))
        return tensor_bytes(kind, shape)
    weight_class = onnx_bits.weight_class(tensor_class)
    layer_bits = {key: int(bits) for key, bits in packing.mix}
    bits = 32 if weight_class is None else onnx_bits.bits_of(packing.name, weight_class, layer, layer_bits)
    return onnx_bits.stored_bytes(tensor_class, shape, bits, packing.block)


def _as_stored(groups: Iterable[Group], packing: Packing, tied: bool) -> Iterator[Group]:
    """In an ONNX file a tied embedding is the head's tensor; layers of one third may have different bits."""
    for group in groups:
        if packing.format == "onnx" and packing.mix and group.layers:
            yield from (group._replace(tensors=n, layer=layer, layers=()) for layer, n in Counter(group.layers).items())
        elif packing.format == "onnx" and tied and group.tensor_class == "embedding":
            yield group._replace(tensor_class="head")
        else:
            yield group


def _sizes(
    model: ModelHeaders, experts: int, packing: Packing, width: int | None = None
) -> Iterator[tuple[Group, int]]:
    """Every group of the file with the bytes of one of its tensors."""
    for group in stored_groups(model, experts, packing, width):
        yield group, stored_bytes(packing, group.tensor_class, group.shape, group.layer)


def tensor_data_bytes(model: ModelHeaders, experts: int, packing: Packing, width: int | None = None) -> int:
    """Bytes of all tensors in the file, without alignment and metadata."""
    return sum(group.tensors * size for group, size in _sizes(model, experts, packing, width))


def file_bytes(model: ModelHeaders, experts: int, packing: Packing, width: int | None = None) -> int:
    """Bytes of the whole file: tensors, alignment, tensor records, tokenizer."""
    if packing.format == "onnx":
        return tensor_data_bytes(model, experts, packing, width) + rotary_table_bytes(model.spec) + ONNX_GRAPH_BYTES
    total = GGUF_HEADER_BYTES + model.tokenizer_bytes
    for group, size in _sizes(model, experts, packing, width):
        total += group.tensors * (-(-size // GGUF_ALIGNMENT) * GGUF_ALIGNMENT + GGUF_TENSOR_RECORD_BYTES)
    return total


def rotary_table_bytes(spec: ModelSpec) -> int:
    """An ONNX file holds cosines and sines of every position in float32."""
    return 4 * spec.context_length * int(spec.head_dim * spec.rotary_share)


def kv_cache_bytes(model: ModelHeaders, cache: Cache, file_format: str = "gguf") -> int:
    """Keys and values of all layers for a full context."""
    values = sum(_cached_values(model.spec, layer, cache.context_length) for layer in range(model.spec.layers))
    return ceil(values * KV_BYTES[file_format, cache.precision])


def _cached_values(spec: ModelSpec, layer: int, context_length: int) -> int:
    """Numbers that one layer keeps: keys and values, or the latent of multi-head latent attention; convolutions and
    linear attention keep a small state that does not grow."""
    kind = spec.kind_of(layer)
    if kind in ("conv", "linear"):
        return 0
    tokens = min(context_length, spec.sliding_window or context_length) if kind == "sliding" else context_length
    if spec.latent is not None:
        return tokens * (spec.latent.kv_rank + spec.latent.rope_dim)
    return tokens * 2 * spec.kv_heads * spec.head_dim


def kv_precisions(model: ModelHeaders, target: Target, file_format: str) -> tuple[KvPrecision, ...]:
    """What the target allows and the runtime can do, best first: 8-bit keys need GGUF and heads in blocks of 32."""
    asked, can = target.runtime.kv_cache, file_format == "gguf" and model.spec.head_dim % 32 == 0
    if asked == "f16" or not can:
        return ("f16",)
    return ("q8_0",) if asked == "q8_0" else ("f16", "q8_0")


def buffer_bytes(model: ModelHeaders) -> int:
    """Assumed: the process, and float32 logits and eight hidden states for a batch of 512 tokens."""
    return PROCESS_BYTES + BATCH_TOKENS * 4 * (model.spec.vocab + 8 * model.spec.hidden)


def decode_bytes(
    model: ModelHeaders, experts: int, top_k: int, packing: Packing, cache: Cache, width: int | None = None
) -> int:
    """Bytes read to decode one token at a full context: used weights once, and the KV cache."""
    sizes = list(_sizes(model, experts, packing, width))
    has_head = any(group.tensor_class == "head" for group, _ in sizes)
    total = kv_cache_bytes(model, cache, packing.format)
    for group, size in sizes:
        if group.tensor_class == "embedding" and has_head:
            continue  # one row of it
        read = group.tensors * size
        total += read * top_k // experts if group.tensor_class in EXPERT_OWNED else read
    return total


def estimate(
    model: ModelHeaders,
    target: Target,
    experts: int,
    top_k: int,
    packing: Packing,
    cache: Cache | None = None,
    width: int | None = None,
) -> Estimate:
    """Sizes and speed of the student with `experts` of the teacher's experts per layer, stored as `packing`.

    Args:
        cache: the planned KV cache; None = float16 at the target's context length.
        width: neurons kept per expert; None = all.
    """
    cache = cache or Cache(target.context_length)
    size = file_bytes(model, experts, packing, width)
    kv = kv_cache_bytes(model, cache, packing.format)
    bandwidth = machine_of(target).bandwidth_bytes_per_s
    read = decode_bytes(model, experts, top_k, packing, cache, width)
    spec = model.spec
    return Estimate(
        params_total=model.params_total(experts, width),
        params_active=model.params_active(experts, top_k, width),
        file_bytes=size,
        kv_cache_bytes=kv,
        kv_precision=cache.precision,
        context_length=cache.context_length,
        peak_memory_bytes=int(size * RESIDENT_PER_FILE_BYTE[packing.format]) + kv + buffer_bytes(model),
        decode_bytes_per_token=read,
        decode_tokens_per_s=None if bandwidth is None else bandwidth / read,
        routed_expert_share_kept=experts / spec.moe.experts * (width or spec.moe.expert_width) / spec.moe.expert_width,
    )
