"""The metadata of a GGUF file that says what its graph must compute: sizes, attention, experts.

What: `hyperparameters` (what every file has) and one function per thing that only some architectures ask for, which a row
of `LAYOUTS` (gguf_layout.py) lists. Values that llama.cpp would otherwise guess from the number of layers or take from a
default of the architecture are always written: gating function, renormalisation, ranks of latent attention.
"""

from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType

from moe_edge.contracts.spec import ModelSpec


def hyperparameters(writer: GGUFWriter, spec: ModelSpec) -> None:
    """What every architecture reads, for a model that `architecture_of` admits."""
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.context_length)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.dense_width or spec.moe.expert_width)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    writer.add_vocab_size(spec.vocab)
    _attention(writer, spec)
    if spec.moe_layers:
        _experts(writer, spec)


def _attention(writer: GGUFWriter, spec: ModelSpec) -> None:
    writer.add_head_count(spec.heads)
    if spec.latent is None:
        conv = [0 if spec.kind_of(layer) == "conv" else spec.kv_heads for layer in range(spec.layers)]
        writer.add_head_count_kv(conv if 0 in conv else spec.kv_heads)
        if spec.head_dim * spec.heads != spec.hidden:
            writer.add_key_length(spec.head_dim)
            writer.add_value_length(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_rope_dimension_count(spec.rotary_dim)
    if "sliding" in spec.layer_kinds and spec.sliding_window:
        writer.add_sliding_window(spec.sliding_window)
    if spec.rope_scaling is not None and spec.rope_scaling["rope_type"] == "yarn":
        _yarn(writer, spec)


def _yarn(writer: GGUFWriter, spec: ModelSpec) -> None:
    rope = spec.rope_scaling
    assert rope is not None
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))
    if rope.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * float(rope["mscale_all_dim"]))  # deepseek2 divides by 0.1


def _experts(writer: GGUFWriter, spec: ModelSpec) -> None:
    """A softmax of the chosen logits is one over all that is renormalised."""
    moe = spec.moe
    sigmoid = moe.gating == "sigmoid"
    writer.add_expert_count(moe.experts)
    writer.add_expert_used_count(moe.top_k)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID if sigmoid else ExpertGatingFuncType.SOFTMAX)
    writer.add_expert_weights_norm(moe.renormalise)
    if moe.routed_scale != 1.0:
        writer.add_expert_weights_scale(moe.routed_scale)
    if moe.groups_used < moe.groups:  # llama.cpp aborts when all groups are used
        writer.add_expert_group_count(moe.groups)
        writer.add_expert_group_used_count(moe.groups_used)


def expert_width(writer: GGUFWriter, spec: ModelSpec) -> None:
    """F, where feed_forward_length is the width of dense layers."""
    writer.add_expert_feed_forward_length(spec.moe.expert_width)


def shared_width(writer: GGUFWriter, spec: ModelSpec) -> None:
    """Neurons of the shared expert, where there is one."""
    if spec.moe.shared_width:
        writer.add_expert_shared_feed_forward_length(spec.moe.shared_width)


def shared_count(writer: GGUFWriter, spec: ModelSpec) -> None:
    """The shared expert's width in experts."""
    writer.add_expert_shared_count(spec.moe.shared_width // spec.moe.expert_width)


def leading_dense(writer: GGUFWriter, spec: ModelSpec) -> None:
    """How many layers have no experts; they come first."""
    writer.add_leading_dense_block_count(len(spec.dense_layers))


def every_layer(writer: GGUFWriter, spec: ModelSpec) -> None:
    """Every layer after the dense ones has experts."""
    writer.add_interleave_moe_layer_step(1)


def multipliers(writer: GGUFWriter, spec: ModelSpec) -> None:
    """Granite's four; the graph divides by the last."""
    writer.add_embedding_scale(spec.embedding_scale)
    writer.add_attention_scale(spec.attention_scale or spec.head_dim**-0.5)
    writer.add_residual_scale(spec.residual_scale)
    writer.add_logit_scale(spec.logits_divisor)


def convolutions(writer: GGUFWriter, spec: ModelSpec) -> None:
    """Taps of the short convolutions."""
    writer.add_shortconv_l_cache(spec.mixer["kernel"])


def latent_attention(writer: GGUFWriter, spec: ModelSpec) -> None:
    """One key-value head as wide as the latent, and the sizes of the heads that it expands to.

    A rank of 0 for q says that q has no latent; without it llama.cpp decides by the number of layers, so that a
    DeepSeek-V2-Lite that lost one would not load.
    """
    latent = spec.latent
    assert latent is not None
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(latent.q_rank or 0)
    writer.add_kv_lora_rank(latent.kv_rank)
    writer.add_key_length(latent.kv_rank + latent.rope_dim)
    writer.add_value_length(latent.kv_rank)
    writer.add_key_length_mla(latent.nope_dim + latent.rope_dim)
    writer.add_value_length_mla(latent.value_dim)


def linear_attention(writer: GGUFWriter, spec: ModelSpec) -> None:
    """Sizes of the gated delta rule, the layers that have it, and the sections of a rotation made for images.

    For text all sections count the same positions, so that any that cover the rotating columns compute the same.
    """
    mixer, pairs = spec.mixer, spec.rotary_dim // 2
    writer.add_ssm_conv_kernel(mixer["kernel"])
    writer.add_ssm_state_size(mixer["key_dim"])
    writer.add_ssm_group_count(mixer["key_heads"])
    writer.add_ssm_time_step_rank(mixer["value_heads"])
    writer.add_ssm_inner_size(mixer["value_heads"] * mixer["value_dim"])
    recurrent = [spec.kind_of(layer) == "linear" for layer in range(spec.layers)]
    writer.add_array(f"{writer.arch}.attention.recurrent_layers", recurrent)
    writer.add_rope_dimension_sections([-(-pairs // 3), -(-(pairs - 1) // 3), pairs // 3, 0])
