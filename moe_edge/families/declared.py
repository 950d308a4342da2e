"""What a family declares: where its weights lie, under which config keys its sizes stand, and what its layers compute.

`Family` (base.py) is `Declared` with the functions that read a config and a checkpoint by it. No torch in here.

Legend: E experts, K top-k.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_edge.families.checks import Refusal

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Names:
    """Where a decoder layer keeps the tensors of its feed-forward block."""

    block: str = "mlp"  # below the layer; a dense layer keeps its matrices there, too
    router: str = "gate"  # module below the block
    weight: str = "weight"  # below the router
    selection_bias: str = ""  # below the block
    gate: str = "gate_proj"  # of an expert, of the shared expert and of a dense layer
    up: str = "up_proj"
    down: str = "down_proj"
    fused_gate_up: str = "experts.gate_up_proj"  # below the block: all experts in one tensor
    fused_down: str = "experts.down_proj"
    per_expert: bool = True  # does a checkpoint also name experts one by one
    shared: str = ""  # module below the layer
    shared_router: str = ""  # module below the layer
    shared_gate_up: str = ""  # one matrix for both, below `shared`; "": two, named as in an expert
    shared_down: str = ""


@dataclass(frozen=True)
class AttentionNames:
    """What families call the rest of a decoder layer (relative to it), and the last norm (relative to the body)."""

    output: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    input_norm: str = "input_layernorm"
    post_attention_norm: str = "post_attention_layernorm"
    final_norm: str = "norm"


@dataclass(frozen=True)
class Declared:
    """One model_type: everything in which families differ.

    `defaults` are those of the transformers config class, for keys that an older config.json leaves out.
    """

    model_type: str
    defaults: Mapping[str, Any]
    refusals: tuple[Refusal, ...] = ()  # (condition on the config with defaults, reason)

    # names
    saved: Names = Names()  # in checkpoints
    loaded: Names | None = None  # in the loaded model, where transformers renames; a checkpoint may have these, too
    attention_names: AttentionNames = AttentionNames()
    prefixes: tuple[str, ...] = ("model.",)  # of everything but the head; the first that a checkpoint has
    ignored: tuple[str, ...] = ()  # prefixes of tensors that are not part of the language model
    float32: tuple[str, ...] = ()  # ends of names that transformers keeps in float32 in a half-precision model

    # config keys
    also_called: tuple[str, ...] = ()  # other model_types
    nested_key: str | None = None  # where a model of several parts keeps the language model's config
    expert_keys: tuple[str, ...] = ("num_experts", "num_local_experts")  # E: any is read, all are written
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)  # K: the first is read, those that are there are written
    expert_width_key: str = "moe_intermediate_size"
    eps_key: str = "rms_norm_eps"
    older_keys: Mapping[str, str] = field(default_factory=dict)  # older name -> name
    mtp_key: str | None = None  # number of extra layers that predict further tokens; never loaded, never saved

    # attention
    qk_norm: Literal["none", "per_head", "full_width"] = "none"
    qk_norm_key: str | None = None  # config key that switches the q and k norms on; None: always
    bias_key: str | None = None  # config key that switches the q, k, v bias on
    output_bias: bool = False  # the same key also gives the output projection one
    sliding_key: str | None = None  # config key that switches the sliding window on; None: always on
    rotary: Literal["plain", "any"] = "any"  # plain: scaled and partial rotary embeddings are refused

    # mixture of experts
    gating: Literal["softmax", "sigmoid", "softmax_topk", "sparsemixer"] = "softmax"
    norm_topk: bool | None = True  # None: the config's norm_topk_prob decides
    router_bias: bool = False
    bias_argument: bool = False  # the block hands its selection bias to the router
    selection_key: str | None = None  # config key that switches the selection bias on; None: wherever it has a name
    expert_biases: bool = False
    interleaved: bool = False  # gate and up columns alternate, and expert matrices are transposed
    group_score: Literal["max", "top2_sum"] = "max"
    fixed_top_k: int | None = None  # the only K that the model code computes
    shared_width: Callable[[Config], int] | None = None
    shared_gated: bool = False
    dense_layers: Callable[[Config], Iterable[int]] | None = None
    spec_fields: Callable[[Config], dict[str, Any]] | None = None  # further fields of ModelSpec
    moe_fields: Callable[[Config], dict[str, Any]] | None = None  # further fields of MoESpec

    @property
    def in_memory(self) -> Names:
        """Names in the loaded model."""
        return self.loaded or self.saved
