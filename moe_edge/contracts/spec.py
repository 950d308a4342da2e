"""The neutral description of a model: what a family reads from config.json and what planners and exporters consume.

Nothing here names a Hugging Face class, a GGUF key or an ONNX operator, so that a new family is one row and every back
end understands it at once. What goes beyond the plain model (softmax routing, grouped-query attention, RMS norms) is
a `Feature`; a back end lists those it computes and refuses the others (contracts/capability_table.py).

Shapes use the legend L layers, E experts, K top-k, D model, F expert width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# The classes into which every weight of a model falls; plans and quantization recipes speak in these.
TensorClass = Literal[
    "embedding", "head", "head_bias", "norm",
    "attention_q", "attention_k", "attention_v", "attention_o",
    "attention_other",  # other matrices that mix tokens: latent projections, in and out of a convolution
    "attention_bias",  # what never gets quantized there: biases, sinks, convolution kernels, decay rates
    "router", "router_bias", "selection_bias",
    "expert_gate", "expert_up", "expert_down", "expert_bias",
    "shared_gate", "shared_up", "shared_down", "shared_router",
    "dense_gate", "dense_up", "dense_down",  # the feed-forward block of a layer without experts
]  # fmt: skip
EXPERT_CLASSES: tuple[TensorClass, ...] = ("expert_gate", "expert_up", "expert_down")
EXPERT_OWNED: tuple[TensorClass, ...] = (*EXPERT_CLASSES, "expert_bias")  # goes with its expert
EXPERT_SIZED: tuple[TensorClass, ...] = (*EXPERT_OWNED, "router", "router_bias", "selection_bias")  # first axis E

Feature = Literal[
    "sigmoid", "sparsemixer", "selection_bias", "router_bias", "expert_biases", "clamped_swiglu", "groups",
    "routed_scale", "dense_layers", "ungated_shared", "latent_attention", "convolutions", "linear_attention", "sinks",
    "mixed_windows", "output_bias", "output_gate", "norm_after_rope", "partial_rotary", "scaled_rotary", "paired_rotary",
    "layer_norms", "norms_around_one", "multipliers", "head_bias",
]  # fmt: skip
FEATURES: dict[Feature, str] = {
    "sigmoid": "sigmoid gates",
    "sparsemixer": "sparsemixer routing, whose weights depend on a threshold around each choice",
    "selection_bias": "a bias that only selects experts",
    "router_bias": "a bias on the router's logits",
    "expert_biases": "biases inside the experts",
    "clamped_swiglu": "a clamped SwiGLU",
    "groups": "a choice of expert groups before that of experts",
    "routed_scale": "a factor on the routed experts",
    "dense_layers": "layers without experts",
    "ungated_shared": "a shared expert without a gate",
    "latent_attention": "multi-head latent attention",
    "convolutions": "convolution layers",
    "linear_attention": "linear attention layers",
    "sinks": "attention sinks",
    "mixed_windows": "a sliding window in some of the layers",
    "output_bias": "a bias on the attention's output",
    "output_gate": "a gate on the attention's output",
    "norm_after_rope": "q/k norms after the rotation",
    "partial_rotary": "a partial rotation of q and k",
    "scaled_rotary": "scaled rotary embeddings",
    "paired_rotary": "a rotation of neighbouring columns",
    "layer_norms": "layer norms with a bias",
    "norms_around_one": "norms whose gain is one plus the weight",
    "multipliers": "multipliers of embedding, attention, residual or logits",
    "head_bias": "a bias on the head",
}


SCORED_BY = {"max": 1, "top2_sum": 2}  # how a group of experts is scored -> by how many of its best


@dataclass(frozen=True)
class MoESpec:
    """The Mixture-of-Experts block of a model; identical in every layer that has one."""

    experts: int  # E
    top_k: int  # K
    expert_width: int  # F
    # What makes weights of logits: a softmax over all experts, a sigmoid of each, a softmax over the K chosen ones (the
    # same numbers as softmax with renormalise), or the sparsemixer of https://arxiv.org/abs/2409.12136.
    gating: Literal["softmax", "sigmoid", "softmax_topk", "sparsemixer"]
    renormalise: bool  # are the top-k weights divided by their sum
    shared_width: int = 0  # 0: no shared expert
    shared_gated: bool = False  # a sigmoid gate scales the shared expert
    activation: Literal["silu", "clamped_swiglu"] = "silu"
    swiglu_alpha: float = 1.0  # clamped: min(g, limit) * sigmoid(alpha * g) * (clamp(u) + 1)
    swiglu_limit: float | None = None
    router_bias: bool = False  # added to the logits
    selection_bias: bool = False  # added to the gates to choose experts, not to weigh them
    expert_biases: bool = False  # on gate, up and down
    groups: int = 1  # contiguous, of E / groups experts; the best `groups_used` of them are searched
    groups_used: int = 1
    group_score: Literal["max", "top2_sum"] = "max"  # of a group
    routed_scale: float = 1.0  # on the weights, after renormalisation
    experts_per_layer: tuple[int, ...] = ()  # of each MoE layer, where some of its E places are padding; empty: E

    def reachable(self, experts: int) -> int:
        """Among how many of `experts` kept experts a token chooses."""
        return experts // self.groups * self.groups_used

    @property
    def fewest_per_group(self) -> int:
        """Experts that every group needs for its score."""
        return SCORED_BY[self.group_score]


@dataclass(frozen=True)
class LatentSpec:
    """Multi-head latent attention (https://arxiv.org/abs/2405.04434): keys and values from one small latent."""

    kv_rank: int
    q_rank: int | None  # None: q is projected directly
    nope_dim: int  # columns of a q or k head that do not rotate
    rope_dim: int  # columns that do; shared by all heads of k
    value_dim: int


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only MoE language model."""

    family: str  # the model_type
    layers: int  # all decoder layers
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
    dense_layers: tuple[int, ...] = ()  # decoder layers without experts
    dense_width: int = 0  # of their feed-forward block
    attention: Literal["gqa", "mla"] = "gqa"  # of the layers of kind full and sliding
    latent: LatentSpec | None = None  # with mla
    layer_kinds: tuple[Literal["full", "sliding", "conv", "linear"], ...] = ()  # empty: all alike
    mixer: Mapping[str, int] = field(default_factory=dict)  # sizes of conv or linear layers
    rotary_share: float = 1.0  # of the head that rotates
    rope_scaling: Mapping[str, Any] | None = None  # its parameters, `rope_type` among them
    paired_rotary: bool = False  # neighbouring columns rotate together, instead of the two halves
    norm_after_rope: bool = False
    output_bias: bool = False  # on the attention's output projection
    output_gate: bool = False  # q carries a sigmoid gate of the attention's output
    sinks: bool = False
    norm: Literal["rms", "rms_around_one", "layer"] = "rms"  # the gated norm of linear attention is always rms
    head_bias: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # None: head_dim ** -0.5
    residual_scale: float = 1.0  # on what a block adds
    logits_divisor: float = 1.0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Decoder layers with experts, in order; position i of the statistics is layer `moe_layers[i]`."""
        dense = set(self.dense_layers)
        return tuple(layer for layer in range(self.layers) if layer not in dense)

    def real_experts(self, layer: int) -> list[int]:
        """The ids of a layer's experts that are no padding; decoder layer."""
        moe = self.moe
        if not moe.experts_per_layer:
            return list(range(moe.experts))
        return places(moe.experts_per_layer[self.moe_layers.index(layer)], moe.experts, moe.groups)

    def real_shape(self, entry: "TensorEntry") -> tuple[int, ...]:
        """The shape of one weight without padding experts."""
        if entry.layer is None or entry.tensor_class not in EXPERT_SIZED or not self.moe.experts_per_layer:
            return entry.shape
        return (len(self.real_experts(entry.layer)), *entry.shape[1:])

    def kind_of(self, layer: int) -> str:
        """How a layer mixes tokens: full, sliding, conv or linear."""
        return self.layer_kinds[layer] if self.layer_kinds else "full"

    @property
    def rotary_dim(self) -> int:
        """Columns of a q or k head that rotate."""
        return self.latent.rope_dim if self.latent else int(self.head_dim * self.rotary_share)

    @property
    def features(self) -> frozenset[Feature]:
        """What a back end must compute beyond the plain model."""
        moe, kinds = self.moe, set(self.layer_kinds)
        scales = (self.embedding_scale, self.attention_scale or 1.0, self.residual_scale, self.logits_divisor)
        present: dict[Feature, bool] = {
            "sigmoid": moe.gating == "sigmoid",
            "sparsemixer": moe.gating == "sparsemixer",
            "selection_bias": moe.selection_bias,
            "router_bias": moe.router_bias,
            "expert_biases": moe.expert_biases,
            "clamped_swiglu": moe.activation == "clamped_swiglu",
            "groups": moe.groups > 1,
            "routed_scale": moe.routed_scale != 1.0,
            "dense_layers": bool(self.dense_layers),
            "ungated_shared": bool(moe.shared_width) and not moe.shared_gated,
            "latent_attention": self.attention == "mla",
            "convolutions": "conv" in kinds,
            "linear_attention": "linear" in kinds,
            "sinks": self.sinks,
            "mixed_windows": "sliding" in kinds and bool(kinds - {"sliding"}),
            "output_bias": self.output_bias,
            "output_gate": self.output_gate,
            "norm_after_rope": self.norm_after_rope,
            "partial_rotary": self.rotary_share != 1.0,
            "scaled_rotary": self.rope_scaling is not None,
            "paired_rotary": self.paired_rotary,
            "layer_norms": self.norm == "layer",
            "norms_around_one": self.norm == "rms_around_one",
            "multipliers": self.attention_scale is not None or any(scale != 1.0 for scale in scales),
            "head_bias": self.head_bias,
        }
        return frozenset(name for name, there in present.items() if there)


def places(count: int, total: int, groups: int = 1) -> list[int]:
    """Where `count` experts stand among `total` places: at the beginning of each of the router's groups."""
    size = total // groups
    return [group * size + offset for group in range(groups) for offset in range(count // groups)]


def keepable_counts(spec: ModelSpec, top_k: int | None = None) -> list[int]:
    """The numbers of experts that every layer of a model can keep, ascending, all of them included.

    Groups keep equally many, in their order; every group needs enough for its score, and the groups that a token may
    search must hold its top-k.

    Args:
        top_k: the student's, where it differs from the model's.
    """
    moe, wanted = spec.moe, spec.moe.top_k if top_k is None else top_k
    fewest = moe.groups * moe.fewest_per_group
    return [
        count for count in range(fewest, moe.experts + 1) if count % moe.groups == 0 and moe.reachable(count) >= wanted
    ]


Layout = Literal["whole", "per_expert", "first_half", "second_half", "even", "odd"]


@dataclass(frozen=True)
class TensorEntry:
    """One weight as the back ends see it: a neutral name and where its numbers lie in the checkpoint.

    `sources` has one checkpoint name for a plain tensor, E names (stacked on a new first axis) for an expert tensor, or the one
    name of a fused tensor that stores gate and up together; `layout` says which rows of it are meant.
    """

    tensor_class: TensorClass
    layer: int | None  # None: not in a layer
    # weight; q_bias, k_bias, v_bias, o_bias, sinks; gate_bias, up_bias, down_bias; q_norm, k_norm, input_norm,
    # post_attention_norm, final_norm, each also with _bias; of other attention the name of the projection
    part: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]  # of the assembled tensor: expert_gate is (E, F, D), expert_down is (E, D, F)
    layout: Layout = "whole"
    transposed: bool = False  # the last two axes of the source are exchanged
