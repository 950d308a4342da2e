"""What a user should know about a choice, in words: what it saves and what it does not, what is doubtful, how to run it."""

from collections.abc import Iterator

from moe_edge.contracts.capabilities import RUNTIME_OF_FORMAT, advice
from moe_edge.contracts.units import format_bytes
from moe_edge.planning.demand import Demand
from moe_edge.planning.headers import ModelHeaders
from moe_edge.planning.options import Option, Space

UNSAFE_DROPPED_SHARE = 0.5


def describe(option: Option, model: ModelHeaders) -> str:
    """'10 of 16 experts at Q4_K_M (134.2 MiB)'; with top-k and width where they are not the teacher's."""
    size, moe = format_bytes(option.estimate.file_bytes), model.spec.moe
    shape = f" (top-{option.shape.top_k})" if option.shape.top_k != moe.top_k else ""
    shape += f" of {option.shape.width} neurons" if option.shape.width is not None else ""
    return f"{option.experts} of {moe.experts} experts{shape} at {option.packing.label} ({size})"


def notes_of(space: Space, demand: Demand, choice: Option) -> Iterator[str]:
    """What a user should know about a choice."""
    model, total, expected = space.model, space.model.spec.moe.experts, choice.estimate
    if choice.experts < total:
        whole = space.option(total, choice.packing)
        sizes = [format_bytes(option.estimate.file_bytes) for option in (whole, choice)]
        yield (
            f"Keeping {choice.experts} of {total} experts shrinks the {choice.packing.label} file from {sizes[0]} to "
            f"{sizes[1]}. Decoding still reads {format_bytes(expected.decode_bytes_per_token or 0)} per token at "
            f"{expected.context_length} tokens of context: that falls only with top-k or the expert width."
        )
    if 1 - choice.experts / total > UNSAFE_DROPPED_SHARE:
        yield f"Unsafe: {1 - choice.experts / total:.0%} of the experts are dropped; beyond 50 % models often break."
    if demand.uneven and choice.experts < total:
        yield (
            f"plan.uneven: layers keep {choice.experts} experts on average. The profile decides how many each; a GGUF then "
            "grows to what the largest layer's number would take everywhere, ONNX stays as estimated here."
        )
    yield from _cache_notes(space, choice)
    if not demand.formats:
        yield "Only the transformers checkpoint is delivered; its size is estimated at 16 bits per weight."
    if space.target.budget.ttft is not None:
        yield "target.budget.ttft is not predicted; it is measured by validate."
    if space.target.budget.decode_tokens_per_s is not None and expected.decode_tokens_per_s is None:
        yield "target.budget.decode_tokens_per_s cannot be checked: the target's bandwidth is unknown."
    on_gpu = space.target.runtime.gpu_layers != 0
    for name in demand.formats:
        yield from advice(RUNTIME_OF_FORMAT[name], model.spec, choice.experts, on_gpu, space.width)


def _cache_notes(space: Space, choice: Option) -> Iterator[str]:
    expected = choice.estimate
    if expected.kv_precision != "f16":
        yield (
            f"The KV cache is planned in {expected.kv_precision} ({format_bytes(expected.kv_cache_bytes)}): start "
            "llama.cpp with -fa on -ctk q8_0 -ctv q8_0."
        )
    limit = space.model.spec.context_length
    if limit < space.target.context_length:
        yield (
            f"target.context_length asks for {space.target.context_length} tokens; the model reads at most {limit}, and "
            "no more is planned for."
        )
    if space.context_length < min(space.target.context_length, limit):
        yield (
            f"Planned for {space.context_length} tokens of context: nothing fits {min(space.target.context_length, limit)}, and "
            f"target.context_least allows {space.target.context_least}."
        )
