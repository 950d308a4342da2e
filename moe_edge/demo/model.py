"""The demo teacher's architecture, its balance loss and its expert shares.

What: a `Qwen3MoeForCausalLM` in which every layer is a mixture of experts, and the Switch
load-balancing loss computed per layer.
Why per layer: `transformers` joins the router logits of all layers before it balances, so one
layer's overload can hide another's dead expert; here each layer must balance by itself.
How: used by `moe_edge.demo.train` and `moe_edge.demo.evaluate`.

Shape suffixes: T tokens of a batch, K chosen experts per token, E experts.
"""

from dataclasses import asdict, dataclass

import torch
from torch.nn import functional
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


@dataclass(frozen=True)
class DemoShape:
    """Sizes of the demo teacher; the defaults are the shipped model."""

    vocab_size: int = 4096
    hidden_size: int = 256
    moe_intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 16
    num_experts_per_tok: int = 4
    max_position_embeddings: int = 2048


def build_config(shape: DemoShape, token_ids: dict[str, int]) -> Qwen3MoeConfig:
    """The model configuration; `token_ids` holds `pad_token_id` and `eos_token_id`."""
    return Qwen3MoeConfig(
        **asdict(shape),
        intermediate_size=shape.moe_intermediate_size,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attention_bias=False,
        use_sliding_window=False,
        bos_token_id=None,
        pad_token_id=token_ids["pad_token_id"],
        eos_token_id=token_ids["eos_token_id"],
    )


def build_model(config: Qwen3MoeConfig, seed: int, experts_kernel: str) -> Qwen3MoeForCausalLM:
    """A freshly initialised float32 model; residual outputs start scaled down by depth."""
    torch.manual_seed(seed)
    model: Qwen3MoeForCausalLM = Qwen3MoeForCausalLM(config).float()  # type: ignore[no-untyped-call]  # transformers
    model.set_experts_implementation(experts_kernel)
    depth_scale = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                weight.mul_(depth_scale)
    return model


def expert_counts(router_logits_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """How many of the T x K routed slots each expert got."""
    chosen_TK = router_logits_TE.topk(top_k, dim=-1).indices
    return torch.bincount(chosen_TK.flatten(), minlength=router_logits_TE.shape[-1])


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Switch loss averaged over layers: 1.0 when every expert gets the same share."""
    layer_losses = []
    for logits_TE in router_logits:
        num_experts = logits_TE.shape[-1]
        share_E = expert_counts(logits_TE, top_k) / (logits_TE.shape[0] * top_k)
        probability_E = functional.softmax(logits_TE, dim=-1).mean(dim=0)
        layer_losses.append(num_experts * (share_E * probability_E).sum())
    return torch.stack(layer_losses).mean()


def routed_share(model: Qwen3MoeForCausalLM) -> float:
    """Part of all parameters that lies in routed experts (tied weights counted once)."""
    total = sum(weight.numel() for weight in model.parameters())
    routed = sum(w.numel() for name, w in model.named_parameters() if ".experts." in name)
    return routed / total
