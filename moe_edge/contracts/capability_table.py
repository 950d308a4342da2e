"""What each runtime can execute of each family, as data: nothing is compressed that could not be exported afterwards.

The questions that are asked of it are in capabilities.py. `llama_cpp` reads GGUF, `ort` is ONNX Runtime's CPU provider. Facts
are from llama.cpp's model graphs (src/models/<architecture>.cpp, libllama 0.5.0) and from ONNX Runtime 1.32's QMoE operator.
"""

from dataclasses import dataclass, replace
from typing import Literal

from moe_edge.contracts.spec import Feature

RuntimeName = Literal["llama_cpp", "ort"]
RUNTIME_OF_FORMAT: dict[str, RuntimeName] = {"gguf": "llama_cpp", "onnx": "ort"}

# How a layer with fewer experts than the largest is filled up exactly: padding experts are zero, and this bias of theirs
# is so low that they are never chosen and, because it decides before anything is normalised, take no share of the weights
# either. A family that is not here is refused, for UNPADDABLE's reason or because nothing it has keeps an expert out.
PaddingBias = Literal["router_bias", "selection_bias"]
PADDING: dict[str, PaddingBias] = {
    "gpt_oss": "router_bias",  # on the logits, of which a softmax sees the chosen ones alone
    "deepseek_v3": "selection_bias",  # beside sigmoids, which know nothing of each other
    "glm4_moe": "selection_bias",
    "glm4_moe_lite": "selection_bias",
    "lfm2_moe": "selection_bias",
    "minimax_m2": "selection_bias",
}
NO_BIAS = "no bias of its router could keep a padding expert from being chosen"
UNPADDABLE: dict[str, str] = {
    "ernie4_5_moe": "its selection bias is added to a softmax over all experts, of which padding would take a share",
}


@dataclass(frozen=True)
class Capability:
    """One runtime's demands on one family; the defaults demand nothing."""

    architecture: str  # GGUF architecture, or genai model type
    exported: bool = True  # does moe-edge write this family for this runtime; False: refused as "not yet exported"
    tied_head: bool = True  # can the head be the embedding? False: a tied head is written out as a tensor of its own
    renormalises: bool | None = None  # what the graph does with the top-k weights; None: whatever the model says
    clips_qkv: bool = True
    slides_window: bool = True
    square_attention: bool = False  # heads x head_dim must be the hidden size
    equal_heads: bool = False  # every head needs its own key and value
    computes: frozenset[Feature] = frozenset()  # beyond the plain model; a model with other features is refused
    needs: frozenset[Feature] = frozenset()  # a model without these is refused
    needs_shared_expert: bool = False
    leading_dense: bool = False  # layers without experts must be the first ones
    alternating_windows: bool = False  # a window in layers 0, 2, ..., none in layers 1, 3, ...
    swiglu: tuple[float, float] | None = None  # the only alpha and limit of a clamped SwiGLU; None: any
    rotary_multiple: int = 1  # of the columns of a head that rotate
    rotary_types: tuple[str, ...] = ("yarn",)  # of scaled rotary embeddings, where it computes them at all
    rounds_yarn: bool = False  # to whole columns, and knows only its default scale of attention
    yarn_scales_all: bool = False  # by mscale_all_dim, which must be given and equal mscale
    group_score: Literal["max", "top2_sum"] | None = None  # the only one that the graph computes; None: any
    equal_linear_heads: bool = False  # keys and values of linear attention must be equally wide
    direct_query_layers: tuple[int, ...] = ()  # layer counts at which the loader expects q without a latent
    uneven: Literal["ok", "padded"] = "padded"  # layers with fewer experts: as they are, or filled up (PADDING)
    max_experts: int | None = None
    width_multiple: int = 1  # advised for expert width and hidden size: below it, larger types than the recipe's
    fused_on_gpu: bool = False  # the fused CUDA router wants certain expert counts; otherwise a slower path


_GGUF = Capability(
    "", max_experts=1024, width_multiple=256, fused_on_gpu=True, clips_qkv=False, slides_window=False,
    rounds_yarn=True,
)  # fmt: skip
_ONNX = Capability("", uneven="ok", width_multiple=32, rotary_multiple=16)
_ONNX_LATER = replace(_ONNX, exported=False)


def _features(*names: Feature) -> frozenset[Feature]:
    return frozenset(names)


_GRANITE = _features("multipliers", "output_bias")
_GPT_OSS = _features(
    "router_bias", "expert_biases", "clamped_swiglu", "sinks", "mixed_windows", "output_bias", "scaled_rotary"
)
_ERNIE = _features("selection_bias", "dense_layers", "ungated_shared", "paired_rotary")
_DEEPSEEK2 = replace(
    _GGUF,
    architecture="deepseek2",
    computes=_features(
        "latent_attention", "dense_layers", "ungated_shared", "routed_scale", "groups", "paired_rotary",
        "scaled_rotary", "sigmoid", "selection_bias",
    ),
    needs_shared_expert=True,
    leading_dense=True,
    yarn_scales_all=True,
    group_score="top2_sum",
    direct_query_layers=(26, 27),
)  # fmt: skip
_GLM4 = _features("sigmoid", "selection_bias", "dense_layers", "ungated_shared", "routed_scale", "partial_rotary")
_LFM2 = _features("sigmoid", "selection_bias", "convolutions", "dense_layers")
_QWEN3_5 = _features("linear_attention", "output_gate", "norms_around_one", "partial_rotary")
_SELECTED = _features("selection_bias")
_MINIMAX = _features("sigmoid", "selection_bias", "partial_rotary")
_DENSE = _features("dense_layers")  # a dense student: no layer has experts
_HUNYUAN = _features("norm_after_rope", "ungated_shared")
_GGUF_DENSE = replace(_GGUF, computes=_DENSE)

# A family whose exporter is finished: take `_LATER` off its row, and add what the exporter does not write to the tests.
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
    ("llama_cpp", "granitemoe"): replace(_GGUF, architecture="granitemoe", renormalises=True, computes=_GRANITE),
    ("llama_cpp", "gpt_oss"): replace(
        _GGUF,
        architecture="gpt-oss",
        tied_head=False,
        slides_window=True,
        computes=_GPT_OSS,
        needs=_GPT_OSS - {"scaled_rotary", "mixed_windows"},
        alternating_windows=True,
        swiglu=(1.702, 7.0),
    ),
    ("llama_cpp", "ernie4_5_moe"): replace(
        _GGUF, architecture="ernie4_5-moe", renormalises=True, computes=_ERNIE, leading_dense=True
    ),
    ("llama_cpp", "granitemoeshared"): replace(
        _GGUF, architecture="granitemoe", renormalises=True, computes=_GRANITE | {"ungated_shared"}
    ),
    # deepseek2 and glm4moe take gating, renormalisation and scale from the file's metadata.
    ("llama_cpp", "deepseek_v2"): _DEEPSEEK2,
    ("llama_cpp", "deepseek_v3"): _DEEPSEEK2,
    ("llama_cpp", "glm4_moe_lite"): _DEEPSEEK2,
    ("llama_cpp", "glm4_moe"): replace(
        _GGUF,
        architecture="glm4moe",
        computes=_GLM4 | {"groups"},
        needs=_SELECTED,
        needs_shared_expert=True,
        leading_dense=True,
        group_score="top2_sum",
    ),
    ("llama_cpp", "lfm2_moe"): replace(
        _GGUF,
        architecture="lfm2moe",
        renormalises=True,
        computes=_LFM2,
        needs=_SELECTED,
        square_attention=True,
        leading_dense=True,
    ),
    ("llama_cpp", "minimax_m2"): replace(
        _GGUF, architecture="minimax-m2", renormalises=True, tied_head=False, computes=_MINIMAX, needs=_SELECTED
    ),
    ("llama_cpp", "hunyuan_v1_moe"): replace(
        _GGUF,
        architecture="hunyuan-moe",
        renormalises=True,
        computes=_HUNYUAN,
        needs=_features("norm_after_rope"),
        needs_shared_expert=True,
    ),
    ("llama_cpp", "qwen3_5_moe"): replace(
        _GGUF,
        architecture="qwen35moe",
        renormalises=True,
        computes=_QWEN3_5,
        needs=_features("output_gate", "norms_around_one"),
        needs_shared_expert=True,
        equal_linear_heads=True,
    ),
    # dense students
    ("llama_cpp", "qwen3"): replace(_GGUF_DENSE, architecture="qwen3"),
    ("llama_cpp", "qwen2"): replace(_GGUF_DENSE, architecture="qwen2", square_attention=True),
    ("llama_cpp", "mistral"): replace(_GGUF_DENSE, architecture="llama"),
    ("llama_cpp", "llama"): replace(
        _GGUF, architecture="llama", computes=_DENSE | {"scaled_rotary"}, rotary_types=("llama3",)
    ),
    ("llama_cpp", "granite"): replace(_GGUF_DENSE, architecture="granite", computes=_DENSE | _GRANITE),
    ("ort", "qwen3_moe"): replace(_ONNX, architecture="qwen3"),
    ("ort", "qwen2_moe"): replace(_ONNX, architecture="qwen2"),
    ("ort", "mixtral"): replace(_ONNX, architecture="mistral"),
    ("ort", "olmoe"): replace(_ONNX, architecture="olmo"),
    ("ort", "granitemoe"): replace(_ONNX, architecture="granite", computes=_GRANITE),
    ("ort", "gpt_oss"): replace(_ONNX, architecture="gptoss", computes=_GPT_OSS),
    ("ort", "ernie4_5_moe"): replace(_ONNX, architecture="ernie4_5", renormalises=True, computes=_ERNIE),
    ("ort", "granitemoeshared"): replace(_ONNX, architecture="granite", computes=_GRANITE | {"ungated_shared"}),
    ("ort", "qwen3"): replace(_ONNX, architecture="qwen3", computes=_DENSE | {"output_bias"}),
    ("ort", "qwen2"): replace(_ONNX, architecture="qwen2", computes=_DENSE),
    ("ort", "mistral"): replace(_ONNX, architecture="mistral", computes=_DENSE),
    ("ort", "granite"): replace(_ONNX, architecture="granite", computes=_GRANITE | _DENSE),
    ("ort", "llama"): replace(
        _ONNX,
        architecture="llama",
        computes=_DENSE | {"output_bias", "scaled_rotary"},
        rotary_types=("llama3",),
    ),
    ("ort", "lfm2_moe"): replace(_ONNX, architecture="lfm2_moe", computes=_LFM2 | {"routed_scale"}),
    ("ort", "qwen3_5_moe"): replace(_ONNX_LATER, architecture="qwen3_5_text", computes=_QWEN3_5),
    ("ort", "glm4_moe"): replace(_ONNX, architecture="llama", computes=_GLM4 | {"groups"}),
    ("ort", "minimax_m2"): replace(_ONNX, architecture="llama", computes=_MINIMAX),
    ("ort", "hunyuan_v1_moe"): replace(_ONNX_LATER, architecture="qwen3", computes=_HUNYUAN),
}

_NO_LATENT = (
    "onnxruntime-genai has no builder for multi-head latent attention; export GGUF: --set export.formats=[gguf]"
)
# Refused for good, whatever exporters there are.
NEVER: dict[tuple[RuntimeName, str], str] = {
    ("llama_cpp", "phimoe"): "llama_cpp approximates the sparsemixer routing of phimoe by a renormalised softmax",
    ("ort", "phimoe"): "onnxruntime's CPU operators do not compute the sparsemixer routing of phimoe",
    ("ort", "deepseek_v2"): _NO_LATENT,
    ("ort", "deepseek_v3"): _NO_LATENT,
    ("ort", "glm4_moe_lite"): _NO_LATENT,
}
