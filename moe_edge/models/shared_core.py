"""Mixture-of-experts models whose experts share one core: expert_e(x) = (s_e I + P_e Q_e) core((I + U_e V_e) x).

Each layer has one gated FFN (`shared_core`), and every expert a low-rank `input_wrapper` and `output_wrapper`. The rest of
the model (attention, router, shared experts) is that of its base family. `fold` turns such a model into its base family:
the wrappers are linear, so gate((I + U V) x) = (gate + gate U V) x, and the output side likewise.

This file needs only torch and transformers. It is copied beside the weights as modeling_shared_core.py, so that

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

works without moe-edge; moe-edge itself never runs a file from a model folder and uses this one.

Legend: E experts, D model, F core width, R rank, T tokens, K top-k.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

MODEL_TYPE = "moe_edge_shared_core"
MODELING_FILE = "modeling_shared_core.py"
AUTO_MAP = {
    "AutoConfig": "modeling_shared_core.SharedCoreConfig",
    "AutoModelForCausalLM": "modeling_shared_core.SharedCoreForCausalLM",
}


class Core(nn.Module):
    """One gated FFN: gate_up_proj (2F, D), gate rows first, and down_proj (D, F)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(hidden, width))


class Wrapper(nn.Module):
    """scale_e x + left_e right_e x for every expert e; the scale is 1 and not stored where `scaled` is false."""

    def __init__(self, experts: int, hidden: int, rank: int, scaled: bool) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(experts, hidden, rank))
        self.right = nn.Parameter(torch.empty(experts, rank, hidden))
        self.scale = nn.Parameter(torch.ones(experts)) if scaled else None

    def forward(self, rows_ND: Tensor, expert: int) -> Tensor:
        low_ND = functional.linear(functional.linear(rows_ND, self.right[expert]), self.left[expert])
        return low_ND + (rows_ND if self.scale is None else self.scale[expert] * rows_ND)


class SharedCoreExperts(nn.Module):
    """The experts of one layer; the same call as the experts of the base family."""

    def __init__(self, experts: int, hidden: int, width: int, rank: int, act_fn: nn.Module) -> None:
        super().__init__()
        self.num_experts = experts
        self.shared_core = Core(hidden, width)
        self.input_wrapper = Wrapper(experts, hidden, rank, scaled=False)
        self.output_wrapper = Wrapper(experts, hidden, rank, scaled=True)
        self.act_fn = act_fn

    def run_expert(self, rows_ND: Tensor, expert: int) -> Tensor:
        """One expert's output before the gate weight, for rows of hidden states: (N, D) to (N, D)."""
        wrapped_ND = self.input_wrapper(rows_ND, expert)
        gate_NF, up_NF = functional.linear(wrapped_ND, self.shared_core.gate_up_proj).chunk(2, dim=-1)
        core_ND = functional.linear(self.act_fn(gate_NF) * up_NF, self.shared_core.down_proj)
        out_ND: Tensor = self.output_wrapper(core_ND, expert)
        return out_ND

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' weighted sum for each token: hidden (T, D), index and weights (T, K) to (T, D)."""
        result_TD = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            token_N, place_N = torch.where(top_k_index == expert)
            out_ND = self.run_expert(hidden_states[token_N], expert) * top_k_weights[token_N, place_N, None]
            result_TD = result_TD.index_add(0, token_N, out_ND.to(result_TD.dtype))
        return result_TD

    @property
    def gate_up_proj(self) -> Tensor:
        """Folded: gate_up + gate_up U_e V_e, (E, 2F, D)."""
        core = self.shared_core.gate_up_proj
        return core + (core @ self.input_wrapper.left) @ self.input_wrapper.right

    @property
    def down_proj(self) -> Tensor:
        """Folded: s_e down + P_e Q_e down, (E, D, F)."""
        core, wrapper = self.shared_core.down_proj, self.output_wrapper
        assert wrapper.scale is not None
        return wrapper.scale[:, None, None] * core + wrapper.left @ (wrapper.right @ core)


def share_cores(model: nn.Module, rank: int) -> list[SharedCoreExperts]:
    """Replace the experts of every MoE block by experts with a shared core of the same width, not initialised.

    Returns the new modules, layer by layer.
    """
    blocks = [module for module in model.modules() if "gate_up_proj" in getattr(module, "_parameters", {})]
    owners = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if any(child is block for block in blocks)
    ]
    created = []
    for parent, name in owners:
        old = getattr(parent, name)
        experts, twice_width, hidden = old.gate_up_proj.shape
        new = SharedCoreExperts(experts, hidden, twice_width // 2, rank, old.act_fn).to(old.gate_up_proj)
        setattr(parent, name, new)
        created.append(new)
    return created


@cache
def config_class(base_type: str) -> type[PreTrainedConfig]:
    """The configuration of a base family under the model type of shared cores."""
    base = CONFIG_MAPPING[base_type]
    return type("SharedCoreOf" + base.__name__, (base,), {"model_type": MODEL_TYPE, "__module__": __name__})


@cache
def model_class(base_type: str) -> type[PreTrainedModel]:
    """The causal language model of a base family with shared cores."""
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[base_type]]

    def __init__(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        base.__init__(self, config)
        share_cores(self, config.shared_rank)

    return type("SharedCoreOf" + base.__name__, (base,), {"__init__": __init__, "__module__": __name__})


class SharedCoreConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """What `auto_map` names: reads a configuration and returns it as the class of its base family."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return config_class(config_dict["base_model_type"]).from_dict(config_dict, **kwargs)


class SharedCoreForCausalLM:
    """What `auto_map` names: loads a model as the class of its base family."""

    @classmethod
    def from_pretrained(cls, path: Any, *arguments: Any, config: Any = None, **kwargs: Any) -> Any:
        config = SharedCoreConfig.from_pretrained(path) if config is None else config
        return model_class(config.base_model_type).from_pretrained(path, *arguments, config=config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """transformers asks for it; there is nothing to register."""


def shared_core_model(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """`model` with shared cores in the place of its experts (not initialised), as an instance of its new class.

    The other modules are those of `model`, which must not be used afterwards.
    """
    base_type = model.config.model_type
    values = model.config.to_dict() | {
        "model_type": MODEL_TYPE,
        "base_model_type": base_type,
        "shared_rank": rank,
        "architectures": ["SharedCoreForCausalLM"],
        "auto_map": AUTO_MAP,
    }
    config = config_class(base_type).from_dict(values)
    with torch.device("meta"):
        new = model_class(base_type)(config)
    share_cores(model, rank)
    for name, child in list(model.named_children()):
        setattr(new, name, child)
    for module in new.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = config  # type: ignore[assignment]  # torch declares tensors and modules only
    new.eval()  # type: ignore[no-untyped-call]
    return new


@torch.no_grad()
def fold(model: PreTrainedModel) -> PreTrainedModel:
    """The same function as a plain model of the base family, whose experts are ordinary; exact up to rounding.

    The tensors outside the experts are shared with `model`.
    """
    config = CONFIG_MAPPING[model.config.base_model_type].from_dict(_base_values(model.config))
    with torch.device("meta"):
        plain: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.dtype)  # type: ignore[no-untyped-call]
    shared = {name: module for name, module in model.named_modules() if isinstance(module, SharedCoreExperts)}
    for name, experts in shared.items():
        ordinary = plain.get_submodule(name)
        ordinary.gate_up_proj = nn.Parameter(experts.gate_up_proj.contiguous())
        ordinary.down_proj = nn.Parameter(experts.down_proj.contiguous())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        owner, _, leaf = name.rpartition(".")
        if not any(owner == inside or owner.startswith(inside + ".") for inside in shared):
            _place(plain.get_submodule(owner), leaf, tensor)
    plain.tie_weights()
    plain.eval()  # type: ignore[no-untyped-call]
    return plain


def _base_values(config: PreTrainedConfig) -> dict[str, Any]:
    own = ("base_model_type", "shared_rank", "auto_map", "architectures", "model_type")
    return {key: value for key, value in config.to_dict().items() if key not in own}


def _place(owner: nn.Module, name: str, tensor: Tensor) -> None:
    if name in owner._parameters:
        owner._parameters[name] = tensor  # type: ignore[assignment]  # a parameter of the other model
    else:
        owner._buffers[name] = tensor
