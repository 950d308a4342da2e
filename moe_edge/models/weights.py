"""The weights of a loaded model, read and written in place: one expert at a time, or every large matrix as rows.

One expert is an `Ffn` (`read_expert`, `write_expert`), and all experts of a layer can get another width. transformers
stores the experts in stacked tensors whose layout differs between families: gate and up rows concatenated or interleaved,
transposed or not, with or without biases. The layout is read from the instance (`is_concatenated`, `is_transposed`,
`has_bias`), so that every action is written once.

`weight_rows` gives every matrix that a quantizer changes: its bit class (contracts/quantization.py), its layer, a view of
the parameter with the input columns last, and the neutral imatrix name of those columns. They are found by walking
modules, because the classes are coarse enough that no family needs a row of its own. Norms, routers, gates of one row and
convolutions stay as they are, as they do in the exported file.

Legend: E experts, D model, F expert width, G = 2F rows of gate and up, R rows, N weights of a row (n_in).
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_edge.contracts.errors import InputRejected
from moe_edge.formulas.ffn import Ffn
from moe_edge.models.taps import decoder_layers, dense_taps
from moe_edge.models.views import Experts, MoELayerView, moe_layers

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


def _split(experts: Experts, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(gate, up) of a tensor whose first axis is G."""
    if getattr(experts, "is_concatenated", True):
        gate, up = rows.chunk(2, dim=0)
        return gate, up
    return rows[::2], rows[1::2]


def _join(experts: Experts, gate: Tensor, up: Tensor) -> Tensor:
    if getattr(experts, "is_concatenated", True):
        return torch.cat([gate, up])
    return torch.stack([gate, up], dim=1).flatten(0, 1)


def _stored(experts: Experts, weights: Ffn) -> dict[str, Tensor]:
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


@dataclass(frozen=True)
class WeightRows:
    """One parameter; writing to `rows` changes the model."""

    bit_class: str
    layer: int | None  # decoder layer; None: embedding or head
    position: int | None  # place among the MoE layers, the first axis of the statistics; None: not a MoE layer
    rows: Tensor  # [R, N], or [E, R, N] for experts; a view
    imatrix: str | None  # name in Statistics.imatrix; None: unweighted


def weight_rows(model: PreTrainedModel) -> list[WeightRows]:
    """All quantizable matrices: embedding and head (one entry where tied), then layer by layer."""
    views = {view.index: view for view in moe_layers(model)}
    hidden = _matrix(model.get_input_embeddings()).shape[1]
    tapped = {id(tap.module): tap.name for tap in dense_taps(model)}
    found = list(_ends(model))
    for index, layer in enumerate(decoder_layers(model)):
        view = views.get(index)
        feed_forward = _ids(_dense_block(layer)) if view is None else _ids(view.block) | _ids(view.shared)
        routers = _ids(None if view is None else view.router)
        for module in layer.modules():
            if not isinstance(module, nn.Linear) or module.out_features == 1 or id(module) in routers:
                continue
            bit_class = "shared" if id(module) in feed_forward else "attention"
            name = tapped.get(id(module))
            if name is None and module.in_features == hidden:  # it reads the same input as a tapped matrix
                name = "attention_in" if bit_class == "attention" else "dense_in" if view is None else "ffn_in"
            position = None if view is None else view.position
            found.append(WeightRows(bit_class, index, position, module.weight.data, name))
        if view is not None:
            found += _expert_rows(view)
    return found


def _dense_block(layer: nn.Module) -> nn.Module | None:
    """The feed-forward block of a layer without experts; every token reads it, as it reads shared experts."""
    return getattr(layer, "mlp", None) or getattr(layer, "feed_forward", None)


def _ids(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(inner) for inner in module.modules()}


def _ends(model: PreTrainedModel) -> Iterator[WeightRows]:
    """The head is measured with its input's importance; a tied embedding is the same tensor."""
    ends: Any = model
    embedding, head = _matrix(ends.get_input_embeddings()), _matrix(ends.get_output_embeddings())
    if embedding.data_ptr() != head.data_ptr():
        yield WeightRows("embedding_head", None, None, embedding, None)
    yield WeightRows("embedding_head", None, None, head, "head_in")


def _matrix(module: Any) -> Tensor:
    """The weight of an embedding or a head."""
    weight: Tensor = module.weight.data
    return weight


def _expert_rows(view: MoELayerView) -> Iterator[WeightRows]:
    for bit_class, name, imatrix in (
        ("expert_gate_up", "gate_up_proj", "expert_in"),
        ("expert_down", "down_proj", "expert_down"),
    ):
        stack = getattr(view.experts, name).data
        rows = stack.transpose(1, 2) if view.experts.is_transposed else stack
        yield WeightRows(bit_class, view.index, view.position, rows, imatrix)
