"""May a runtime execute this model, and how well: answers from the table of capabilities.

Read by the planner (refusals before the profile, advice, sizes) and by the exporters, so that nothing is compressed that could
not be exported afterwards.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from moe_edge.contracts.capability_table import (
    CAPABILITIES,
    NEVER,
    NO_BIAS,
    PADDING,
    RUNTIME_OF_FORMAT,
    UNPADDABLE,
    Capability,
    RuntimeName,
)
from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.rotary_scaling import MAX_RAD_PER_TOKEN, is_defined, rounding_error
from moe_edge.contracts.spec import FEATURES, ModelSpec

__all__ = [
    "CAPABILITIES", "NEVER", "RUNTIME_OF_FORMAT", "advice", "capability", "refusals", "require_exportable",
    "require_paddable", "stored_shapes", "unpaddable",
]  # fmt: skip


def capability(runtime: RuntimeName, family: str) -> Capability | None:
    """The row of the table, or None where the runtime does not know the family."""
    return CAPABILITIES.get((runtime, family))


def refusals(runtime: RuntimeName, spec: ModelSpec) -> list[str]:
    """Why this runtime would compute something else than this model; empty when it is right."""
    if (runtime, spec.family) in NEVER:
        return [NEVER[runtime, spec.family]]
    row = capability(runtime, spec.family)
    if row is None:
        return [f"{runtime} does not know the family {spec.family}"]
    if not row.exported:
        return [f"moe-edge does not yet export {spec.family} for {runtime} ({row.architecture})"]
    graph = f"{runtime}'s {row.architecture} graph"
    return [f"{graph} {reason}" for wrong, reason in _mismatches(row, spec) if wrong]


def require_exportable(spec: ModelSpec, formats: Iterable[str]) -> None:
    """Refuse before any work what no file could hold.

    Raises:
        InputRejected: one of the formats cannot represent this model; says why, and which other format can.
    """
    reasons = {name: refusals(runtime, spec) for name, runtime in RUNTIME_OF_FORMAT.items()}
    for name in formats:
        if reasons[name]:
            other = [other for other, why in reasons.items() if not why]
            raise InputRejected(
                f"{name} cannot represent this model",
                where=f"{spec.family}, export.formats",
                why="; ".join(reasons[name]),
                next_command=f"--set export.formats=[{', '.join(other)}]"
                + ("" if other else "   # the transformers checkpoint alone"),
            )


def unpaddable(spec: ModelSpec) -> str | None:
    """Why a layer of this model cannot be filled up with experts that are never chosen; None where it can, exactly."""
    bias = PADDING.get(spec.family)
    if bias is None:
        return UNPADDABLE.get(spec.family, NO_BIAS)
    return None if getattr(spec.moe, bias) else f"this model lacks {FEATURES[bias]}, which would keep padding out"


def require_paddable(spec: ModelSpec) -> None:
    """Refuse before any work layers that keep different numbers of experts: one checkpoint holds them only padded.

    Raises:
        InputRejected: padding would not be exact; says why.
    """
    if why := unpaddable(spec):
        raise InputRejected(
            "layers of this model cannot keep different numbers of experts",
            where=f"{spec.family}, plan.uneven",
            why=f"a checkpoint has one number for all layers, and {why}",
            next_command="--set plan.uneven=false",
        )


def _mismatches(row: Capability, spec: ModelSpec) -> list[tuple[bool, str]]:
    moe, window = spec.moe, spec.sliding_window
    does, wants = ("renormalises", "does not") if row.renormalises else ("does not renormalise", "does")
    width, rotating = spec.heads * spec.head_dim, int(spec.head_dim * spec.rotary_share)
    unknown = ", ".join(FEATURES[feature] for feature in sorted(spec.features - row.computes))
    missing = ", ".join(FEATURES[feature] for feature in sorted(row.needs - spec.features))
    return [
        (bool(unknown), f"does not compute {unknown}"),
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
        (
            bool(rotating % row.rotary_multiple),
            f"rotates a multiple of {row.rotary_multiple} columns of a head, this model {rotating}",
        ),
        (row.needs_shared_expert and not moe.shared_width, "needs a shared expert"),
        (bool(missing), f"needs {missing}"),
        (
            row.max_experts is not None and moe.experts > row.max_experts,
            f"takes at most {row.max_experts} experts, this model has {moe.experts}",
        ),
        *_layer_mismatches(row, spec),
        *_rotary_mismatches(row, spec),
    ]


def _layer_mismatches(row: Capability, spec: ModelSpec) -> list[tuple[bool, str]]:
    """What the graph fixes about the order of the layers and inside the experts."""
    swiglu, dense = (spec.moe.swiglu_alpha, spec.moe.swiglu_limit), spec.dense_layers
    alternating = tuple("full" if layer % 2 else "sliding" for layer in range(spec.layers))
    return [
        (
            row.leading_dense and dense != tuple(range(len(dense))),
            f"needs the layers without experts to be the first ones, here they are {', '.join(map(str, dense))}",
        ),
        (
            row.alternating_windows and (spec.layer_kinds != alternating or not spec.sliding_window),
            "needs a sliding window in layers 0, 2, 4, ... and none in the others (layer_types)",
        ),
        (
            row.swiglu is not None and row.swiglu != swiglu,
            f"clamps its SwiGLU with alpha and limit {row.swiglu}, this model has {swiglu}",
        ),
        (
            row.group_score not in (None, spec.moe.group_score) and spec.moe.groups_used < spec.moe.groups,
            f"scores a group of experts by {row.group_score}, this model by {spec.moe.group_score}",
        ),
        (
            row.equal_linear_heads and spec.mixer.get("key_dim") != spec.mixer.get("value_dim"),
            "needs keys and values of linear attention to be equally wide",
        ),
        (
            spec.latent is not None and spec.latent.q_rank is not None and spec.layers in row.direct_query_layers,
            f"takes a model of {spec.layers} layers for one whose q has no latent",
        ),
    ]


def _rotary_mismatches(row: Capability, spec: ModelSpec) -> list[tuple[bool, str]]:
    rope = spec.rope_scaling
    if rope is None or "scaled_rotary" not in row.computes:
        return []
    if rope["rope_type"] not in row.rotary_types or not is_defined(rope):
        types = " and ".join(row.rotary_types)
        why = f"computes scaled rotary embeddings of type {types} only, with their parameters; this model has {dict(rope)}"
        return [(True, why)]
    if not row.rounds_yarn or rope["rope_type"] != "yarn":
        return []
    error = rounding_error(rope, spec.rotary_dim, spec.rope_theta)
    return [
        _yarn_scale_mismatch(row, rope),
        (
            error > MAX_RAD_PER_TOKEN,
            f"rounds yarn's range to whole columns, for this model an error of {error:.1e} rad per token (truncate)",
        ),
    ]


def _yarn_scale_mismatch(row: Capability, rope: Mapping[str, Any]) -> tuple[bool, str]:
    """Does the graph scale attention as this model does?"""
    if row.yarn_scales_all:
        scales = (rope.get("mscale"), rope.get("mscale_all_dim"))
        wrong = not scales[1] or scales[0] != scales[1] or rope.get("attention_factor") not in (None, 1.0)
        return wrong, f"scales all of attention by mscale_all_dim, which must equal mscale; this model has {dict(rope)}"
    given = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None]
    return bool(given), f"scales attention by yarn's default, this model sets {', '.join(given)}"


def stored_shapes(runtime: RuntimeName, spec: ModelSpec, part: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes in which a runtime's file holds a tensor of the checkpoint: mostly its own, alone.

    llama.cpp works on the latent itself: the matrix that expands it becomes one matrix per head for keys, transposed,
    and one for values.
    """
    if runtime == "llama_cpp" and part == "kv_b" and spec.latent is not None:
        latent = spec.latent
        keys = (spec.heads, latent.kv_rank, latent.nope_dim)
        return [keys, (spec.heads, latent.value_dim, latent.kv_rank)]
    return [shape]


def advice(
    runtime: RuntimeName, spec: ModelSpec, experts_kept: int, on_gpu: bool, width: int | None = None
) -> list[str]:
    """What loads, but slower or larger than it could be."""
    row = capability(runtime, spec.family)
    if row is None:
        return []
    found = []
    widths = {"hidden size": spec.hidden, "expert width": width or spec.moe.expert_width}
    odd = [f"{name} {width}" for name, width in widths.items() if width % row.width_multiple]
    if odd:
        found.append(
            f"{' and '.join(odd)}: no multiple of {row.width_multiple}, so {runtime} stores some tensors in "
            "larger types than the recipe names (counted in the sizes)."
        )
    rope = spec.rope_scaling
    if row.rounds_yarn and rope is not None and rope["rope_type"] == "yarn" and not rope.get("truncate", True):
        found.append(
            f"{runtime} rounds yarn's range to whole columns, this model does not (truncate: false): positions drift apart "
            f"by {rounding_error(rope, spec.rotary_dim, spec.rope_theta):.0e} rad per token (contracts/rotary_scaling.py)."
        )
    if on_gpu and row.fused_on_gpu and not _fused(experts_kept):
        found.append(
            f"{experts_kept} experts are no power of two up to 512 (nor 288 or 576): {runtime} routes unfused on CUDA, a "
            "few per cent slower."
        )
    return found


def _fused(experts: int) -> bool:
    """The counts that llama.cpp's fused CUDA router takes (ggml-cuda/topk-moe.cu)."""
    return experts in (288, 576) or (experts <= 512 and experts & (experts - 1) == 0)
