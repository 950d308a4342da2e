"""What each runtime can execute of each family, as data: nothing is compressed that could not be exported afterwards.

Read by the planner (sizes, refusals before the profile, advice) and by the exporters. `llama_cpp` reads GGUF, `ort`
is ONNX Runtime's CPU provider. Facts are from llama.cpp's model graphs (src/models/<architecture>.cpp, libllama
0.5.0) and from ONNX Runtime 1.32's QMoE operator.
"""

from dataclasses import dataclass, replace
from typing import Literal

from moe_edge.contracts.spec import ModelSpec

RuntimeName = Literal["llama_cpp", "ort"]
RUNTIME_OF_FORMAT: dict[str, RuntimeName] = {"gguf": "llama_cpp", "onnx": "ort"}


@dataclass(frozen=True)
class Capability:
    """One runtime's demands on one family; the defaults demand nothing."""

    architecture: str  # GGUF architecture, or genai model type
    tied_head: bool = True  # can the head be the embedding? False: a tied head is written out as a tensor of its own
    renormalises: bool | None = None  # what the graph does with the top-k weights; None: whatever the model says
    clips_qkv: bool = True
    slides_window: bool = True
    square_attention: bool = False  # heads x head_dim must be the hidden size
    equal_heads: bool = False  # every head needs its own key and value
    needs_shared_expert: bool = False
    uniform_experts: bool = True  # one expert count, top-k and width for all layers
    max_experts: int | None = None
    width_multiple: int = 1  # advised for expert width and hidden size: below it, larger types than the recipe's
    power_of_two_on_gpu: bool = False  # the fused CUDA router needs it; otherwise a slower path


_GGUF = Capability(
    "",
    max_experts=1024,
    width_multiple=256,
    power_of_two_on_gpu=True,
    clips_qkv=False,
    slides_window=False,
)
_ONNX = Capability("", uniform_experts=False, width_multiple=32)

CAPABILITIES: dict[tuple[RuntimeName, str], Capability] = {
    ("llama_cpp", "qwen3_moe"): replace(_GGUF, architecture="qwen3moe", renormalises=True),
    ("llama_cpp", "qwen2_moe"): replace(
        _GGUF,
        architecture="qwen2moe",
        renormalises=False,
        tied_head=False,
        square_attention=True,
        needs_shared_expert=True,
    ),
    ("llama_cpp", "mixtral"): replace(_GGUF, architecture="llama", renormalises=True),
    ("llama_cpp", "olmoe"): replace(
        _GGUF,
        architecture="olmoe",
        renormalises=False,
        tied_head=False,
        square_attention=True,
        equal_heads=True,
    ),
    ("ort", "qwen3_moe"): replace(_ONNX, architecture="qwen3"),
    ("ort", "qwen2_moe"): replace(_ONNX, architecture="qwen2"),
    ("ort", "mixtral"): replace(_ONNX, architecture="mistral"),
    ("ort", "olmoe"): replace(_ONNX, architecture="olmo"),
}


def capability(runtime: RuntimeName, family: str) -> Capability | None:
    """The row of the table, or None where the runtime does not know the family."""
    return CAPABILITIES.get((runtime, family))


def refusals(runtime: RuntimeName, spec: ModelSpec) -> list[str]:
    """Why this runtime would compute something else than this model; empty when it is right."""
    row = capability(runtime, spec.family)
    if row is None:
        return [f"{runtime} has no exporter for the family {spec.family}"]
    graph = f"{runtime}'s {row.architecture} graph"
    return [f"{graph} {reason}" for wrong, reason in _mismatches(row, spec) if wrong]


def _mismatches(row: Capability, spec: ModelSpec) -> list[tuple[bool, str]]:
    moe, window = spec.moe, spec.sliding_window
    does, wants = ("renormalises", "does not") if row.renormalises else ("does not renormalise", "does")
    width = spec.heads * spec.head_dim
    return [
        (
            row.renormalises is not None and row.renormalises != moe.renormalise,
            f"{does} the top-k weights, this model {wants} (norm_topk_prob)",
        ),
        (spec.clip_qkv is not None and not row.clips_qkv, f"ignores clip_qkv={spec.clip_qkv}"),
        (
            window is not None and window < spec.context_length and not row.slides_window,
            f"ignores the sliding window of {window} tokens (max_position_embeddings {spec.context_length})",
        ),
        (
            row.square_attention and width != spec.hidden,
            f"needs heads x head_dim = {width} to be {spec.hidden}",
        ),
        (
            row.equal_heads and spec.kv_heads != spec.heads,
            f"needs {spec.heads} key-value heads, found {spec.kv_heads}",
        ),
        (row.needs_shared_expert and not moe.shared_width, "needs a shared expert"),
        (
            row.max_experts is not None and moe.experts > row.max_experts,
            f"takes at most {row.max_experts} experts, this model has {moe.experts}",
        ),
    ]


def advice(runtime: RuntimeName, spec: ModelSpec, experts_kept: int, on_gpu: bool) -> list[str]:
    """What loads, but slower or larger than it could be."""
    row = capability(runtime, spec.family)
    if row is None:
        return []
    found = []
    widths = {"hidden size": spec.hidden, "expert width": spec.moe.expert_width}
    odd = [f"{name} {width}" for name, width in widths.items() if width % row.width_multiple]
    if odd:
        found.append(
            f"{' and '.join(odd)}: no multiple of {row.width_multiple}, so {runtime} stores some tensors in "
            "larger types than the recipe names (counted in the sizes)."
        )
    if on_gpu and row.power_of_two_on_gpu and experts_kept & (experts_kept - 1):
        found.append(
            f"{experts_kept} experts are no power of two: {runtime} routes unfused on CUDA, a few per cent slower."
        )
    return found
