"""Reading and writing one expert of a loaded model as an `Ffn`, and giving all experts another width.

transformers stores the experts of a layer in stacked tensors whose layout differs between families: gate and up rows
concatenated or interleaved, transposed or not, with or without biases. The layout is read from the instance
(`is_concatenated`, `is_transposed`, `has_bias`), so that every action is written once.

Legend: E experts, F expert width, D model, G = 2F rows of gate and up.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_edge.contracts.errors import InputRejected
from moe_edge.families.views import MoELayerView, moe_layers
from moe_edge.formulas.ffn import Ffn

WIDTH_ATTRIBUTES = ("intermediate_dim", "intermediate_size", "expert_dim", "moe_intermediate_size")


@torch.no_grad()
def read_expert(view: MoELayerView, expert: int) -> Ffn:
    """One expert's weights, in the model's dtype; copies, so that they outlive a change of the model."""
    experts = view.experts
    gate_up, down = experts.gate_up_proj[expert].clone(), experts.down_proj[expert].clone()
    if getattr(experts, "is_transposed", False):
        gate_up, down = gate_up.T, down.T
    gate_FD, up_FD = _split(experts, gate_up)
    if not getattr(experts, "has_bias", False):
        return Ffn(gate_FD, up_FD, down)
    biases = _split(experts, experts.gate_up_proj_bias[expert].clone())
    return Ffn(gate_FD, up_FD, down, *biases, experts.down_proj_bias[expert].clone())


@torch.no_grad()
def write_expert(view: MoELayerView, expert: int, weights: Ffn) -> None:
    """Overwrite one expert in place; the width must be the layer's."""
    for name, tensor in _stored(view.experts, weights).items():
        getattr(view.experts, name)[expert].copy_(tensor)


@torch.no_grad()
def replace_experts(view: MoELayerView, networks: Sequence[Ffn]) -> None:
    """Put new experts, all of one width, in the place of a layer's; as many as before. Parameters are replaced.

    The model's configuration is left alone: see `write_width`.
    """
    stored = [_stored(view.experts, network) for network in networks]
    for name in stored[0]:
        old = getattr(view.experts, name)
        stacked = torch.stack([tensors[name] for tensors in stored]).to(old.dtype).contiguous()
        setattr(view.experts, name, nn.Parameter(stacked, requires_grad=old.requires_grad))
    width = networks[0].gate_FD.shape[0]
    for name in WIDTH_ATTRIBUTES:
        if hasattr(view.experts, name):
            setattr(view.experts, name, width)


def _split(experts: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(gate, up) of a tensor whose first axis is G."""
    if getattr(experts, "is_concatenated", True):
        gate, up = rows.chunk(2, dim=0)
        return gate, up
    return rows[::2], rows[1::2]


def _join(experts: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    if getattr(experts, "is_concatenated", True):
        return torch.cat([gate, up])
    return torch.stack([gate, up], dim=1).flatten(0, 1)


def _stored(experts: nn.Module, weights: Ffn) -> dict[str, Tensor]:
    """Parameter name -> one expert's slice of it, in the instance's layout."""
    gate_up, down = _join(experts, weights.gate_FD, weights.up_FD), weights.down_DF
    if getattr(experts, "is_transposed", False):
        gate_up, down = gate_up.T, down.T
    tensors = {"gate_up_proj": gate_up, "down_proj": down}
    if weights.gate_bias_F is not None and weights.up_bias_F is not None and weights.down_bias_D is not None:
        tensors["gate_up_proj_bias"] = _join(experts, weights.gate_bias_F, weights.up_bias_F)
        tensors["down_proj_bias"] = weights.down_bias_D
    return tensors


def expert_width(view: MoELayerView) -> int:
    """F, the neurons of one expert."""
    return view.experts.down_proj.shape[1 if getattr(view.experts, "is_transposed", False) else 2]


def width_key(model: PreTrainedModel) -> str:
    """The config key that holds the expert width."""
    return moe_layers(model)[0].family.expert_width_key


def check_width(model: PreTrainedModel, width: int) -> None:
    """Can every expert of `model` have `width` neurons, with nothing else changing? Needs no weights.

    Raises:
        InputRejected: other tensors take their size from the same key of the config (shared experts of DeepSeek's kind).
    """
    config = copy.deepcopy(model.config)
    setattr(config, width_key(model), width)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in type(model)(config).named_parameters()}
    experts = {id(parameter) for view in moe_layers(model) for parameter in view.experts.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in experts and shapes.get(name) != parameter.shape:
            why = f"{name} takes its size from {width_key(model)}, too"
            raise InputRejected(f"the expert width of this {model.config.model_type} model cannot change", why=why)


def write_width(model: PreTrainedModel, width: int) -> None:
    """The expert width as the model's configuration has it."""
    setattr(model.config, width_key(model), width)
