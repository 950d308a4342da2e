"""What a student will weigh, need and reach, from headers alone: file bytes, memory, decode speed.

File bytes are exact for GGUF tensors, because the exporter pins the same types (contracts/quantization.py); ONNX
sizes and runtime buffers are assumptions, named below. Decoding one token reads every weight it uses once, so speed
is at most bandwidth x efficiency / bytes read: dropping experts shrinks the file and leaves that number as it is,
unless top-k falls too.

Units: bytes, tokens per second.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import psutil

from moe_edge.compression.headers import Group, ModelHeaders
from moe_edge.contracts.capabilities import RUNTIME_OF_FORMAT, capability
from moe_edge.contracts.plan import Estimate
from moe_edge.contracts.quantization import ALWAYS_F32, pinned_type, tensor_bytes
from moe_edge.contracts.spec import EXPERT_CLASSES, TensorClass
from moe_edge.contracts.target import Fact, Target

GGUF_ALIGNMENT = 32  # every tensor starts at a multiple of this
GGUF_TENSOR_RECORD_BYTES = 96  # name, shape, type and offset of a tensor
GGUF_HEADER_BYTES = 16_384  # hyperparameters, chat template, provenance
ONNX_GRAPH_BYTES = 1 << 20
# precision -> (bits of expert weights, bits of the other quantized weights); norms, routers and biases stay float32
ONNX_BITS = {"fp32": (32, 32), "fp16": (16, 16), "int8": (8, 8), "int4": (4, 8)}
ONNX_SCALE_BYTES = 2  # one float16 scale per block; the block's zero point takes as many bits as a weight
# Assumptions about a runtime besides weights and KV cache: the process itself, and logits and activations of one batch.
PROCESS_BYTES = 64 << 20
BATCH_TOKENS = 512
RESIDENT_PER_FILE_BYTE = {
    "gguf": 1.0,
    "onnx": 1.5,
}  # ONNX Runtime keeps a prepacked copy of quantized experts (measured)
KV_BYTES_PER_VALUE = 2  # float16


class Packing(NamedTuple):
    """How the weights of a file are stored: a GGUF recipe, or an ONNX precision with its block size."""

    format: Literal["gguf", "onnx"]
    name: str
    block: int = 32


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
        memory = float(psutil.virtual_memory().total)
    share, bandwidth = _number(hardware.usable_share), _number(hardware.bandwidth_gb_per_s)
    efficiency = _number(hardware.bandwidth_efficiency)
    return Machine(
        memory_bytes=None if memory is None else int(memory),
        usable_bytes=None if memory is None or share is None else int(memory * share),
        bandwidth_bytes_per_s=None if bandwidth is None or efficiency is None else bandwidth * efficiency * 1e9,
    )


def _number(fact: Fact) -> float | None:
    return fact.value if isinstance(fact.value, float) else None


def stored_groups(model: ModelHeaders, experts: int, packing: Packing) -> tuple[Group, ...]:
    """The tensors that the file holds; a tied head is one of them where the runtime demands it."""
    groups, spec = model.with_experts(experts), model.spec
    row = capability(RUNTIME_OF_FORMAT[packing.format], spec.family)
    writes_head = spec.tied_embeddings and row is not None and not row.tied_head
    return (*groups, ("head", (spec.vocab, spec.hidden), 1)) if writes_head else groups


def stored_bytes(packing: Packing, tensor_class: TensorClass, shape: tuple[int, ...]) -> int:
    """Bytes of one tensor's data."""
    if packing.format == "gguf":
        return tensor_bytes(pinned_type(packing.name, tensor_class, shape[-1]), shape)
    is_expert = tensor_class in EXPERT_CLASSES
    bits = 32 if tensor_class in ALWAYS_F32 else ONNX_BITS[packing.name][0 if is_expert else 1]
    blocks = prod(shape) // _onnx_block(packing.block, shape[-1]) if bits <= 8 else 0
    return prod(shape) * bits // 8 + blocks * (8 * ONNX_SCALE_BYTES + bits) // 8


def _onnx_block(block: int, row_length: int) -> int:
    """The block after halving it until it divides the row."""
    while row_length % block and block > 1:
        block //= 2
    return block


def tensor_data_bytes(model: ModelHeaders, experts: int, packing: Packing) -> int:
    """Bytes of all tensors in the file, without alignment and metadata."""
    return sum(
        count * stored_bytes(packing, name, shape) for name, shape, count in stored_groups(model, experts, packing)
    )


def file_bytes(model: ModelHeaders, experts: int, packing: Packing) -> int:
    """Bytes of the whole file: tensors, alignment, tensor records, tokenizer."""
    if packing.format == "onnx":
        return tensor_data_bytes(model, experts, packing) + ONNX_GRAPH_BYTES
    total = GGUF_HEADER_BYTES + model.tokenizer_bytes
    for name, shape, count in stored_groups(model, experts, packing):
        size = stored_bytes(packing, name, shape)
        total += count * (-(-size // GGUF_ALIGNMENT) * GGUF_ALIGNMENT + GGUF_TENSOR_RECORD_BYTES)
    return total


def kv_cache_bytes(model: ModelHeaders, context_length: int) -> int:
    """Keys and values of all layers in float16 at `context_length` tokens."""
    spec = model.spec
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * KV_BYTES_PER_VALUE * context_length


def buffer_bytes(model: ModelHeaders) -> int:
    """Assumed: the process, and float32 logits and eight hidden states for a batch of 512 tokens."""
    return PROCESS_BYTES + BATCH_TOKENS * 4 * (model.spec.vocab + 8 * model.spec.hidden)


def decode_bytes(model: ModelHeaders, experts: int, top_k: int, packing: Packing, context_length: int) -> int:
    """Bytes read to decode one token at a full context: used weights once, and the KV cache."""
    groups = stored_groups(model, experts, packing)
    has_head = any(name == "head" for name, _, _ in groups)
    total = kv_cache_bytes(model, context_length)
    for name, shape, count in groups:
        if name == "embedding" and has_head:
            continue  # one row of it
        size = count * stored_bytes(packing, name, shape)
        total += size * top_k // experts if name in EXPERT_CLASSES else size
    return total


def estimate(model: ModelHeaders, target: Target, experts: int, top_k: int, packing: Packing) -> Estimate:
    """Sizes and speed of the student with `experts` of the teacher's experts per layer, stored as `packing`."""
    size = file_bytes(model, experts, packing)
    kv = kv_cache_bytes(model, target.context_length)
    bandwidth = machine_of(target).bandwidth_bytes_per_s
    read = decode_bytes(model, experts, top_k, packing, target.context_length)
    return Estimate(
        params_total=model.params_total(experts),
        params_active=model.params_active(experts, top_k),
        file_bytes=size,
        kv_cache_bytes=kv,
        peak_memory_bytes=int(size * RESIDENT_PER_FILE_BYTE[packing.format]) + kv + buffer_bytes(model),
        decode_tokens_per_s=None if bandwidth is None else bandwidth / read,
        routed_expert_share_kept=experts / model.spec.moe.experts,
    )
