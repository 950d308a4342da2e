"""The neutral description of a model: what a family reads from config.json and what planners and exporters consume.

Nothing here names a Hugging Face class, a GGUF key or an ONNX operator, so that a new family is one row and every back
end understands it at once. Shapes use the legend L layers, E experts, K top-k, D model, F expert width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

# The classes into which every weight of a model falls; plans and quantization recipes speak in these.
TensorClass = Literal[
    "embedding", "head", "norm", "attention_q", "attention_k", "attention_v", "attention_o", "attention_bias",
    "router", "expert_gate", "expert_up", "expert_down", "shared_gate", "shared_up", "shared_down", "shared_router",
]  # fmt: skip
EXPERT_CLASSES: tuple[TensorClass, ...] = ("expert_gate", "expert_up", "expert_down")


@dataclass(frozen=True)
class MoESpec:
    """The Mixture-of-Experts block of a model; identical in every layer."""

    experts: int  # E
    top_k: int  # K
    expert_width: int  # F
    gating: Literal["softmax"]  # over all experts, before the top-k
    renormalise: bool  # are the top-k weights divided by their sum
    shared_width: int = 0  # 0: no shared expert
    shared_gated: bool = False  # a sigmoid gate scales the shared expert
    activation: Literal["silu"] = "silu"


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only MoE language model."""

    family: str  # the model_type
    layers: int  # L
    hidden: int  # D
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int  # V, rows of the embedding
    context_length: int  # tokens
    rms_eps: float
    rope_theta: float
    tied_embeddings: bool
    attention_bias: bool  # q, k and v carry a bias
    qk_norm: Literal["none", "per_head", "full_width"]
    moe: MoESpec
    sliding_window: int | None = None
    clip_qkv: float | None = None


@dataclass(frozen=True)
class TensorEntry:
    """One weight as the back ends see it: a neutral name and where its numbers lie in the checkpoint.

    `sources` has one checkpoint name for a plain tensor, E names (stacked on a new first axis) for an expert tensor, or the one
    name of a fused tensor that stores gate and up together.
    """

    tensor_class: TensorClass
    layer: int | None  # None: not in a layer
    part: str  # weight, q_bias, k_bias, v_bias, q_norm, k_norm, input_norm, post_attention_norm, final_norm
    sources: tuple[str, ...]
    shape: tuple[int, ...]  # of the assembled tensor: expert_gate is (E, F, D), expert_down is (E, D, F)
