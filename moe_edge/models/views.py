"""The MoE layers of a loaded model, whatever its family: where the router, the experts and their numbers are.

transformers 5 gives all families one shape: a block with a router and `experts` that hold every expert in stacked
tensors. A forward pre-hook on `experts` sees (hidden_TD, top_k_index_TK, top_k_weights_TK): the true routing, never
recomputed. How one expert works (gate and up concatenated or alternating, transposed, with biases, clamped) is read from
the instance.

Legend: E experts, K top-k, e some experts, T tokens, D model, F expert width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.spec import places
from moe_edge.families import family_of, known_family
from moe_edge.families.base import EXPERTS_PER_LAYER, Family
from moe_edge.families.declared import Names


class Router(nn.Module):
    """What is read of a router of transformers, whatever its class; a type only, no router is an instance of it."""

    top_k: int


class Experts(nn.Module):
    """What is read of an experts module of transformers, whatever its class; a type only, as `Router`."""

    num_experts: int
    gate_up_proj: nn.Parameter  # (E, 2F, D), or (E, D, 2F) where `is_transposed`
    down_proj: nn.Parameter  # (E, D, F), or (E, F, D)
    gate_up_proj_bias: nn.Parameter  # these two only where `has_bias`
    down_proj_bias: nn.Parameter
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool  # all gate rows before all up rows; otherwise they alternate
    _apply_gate: Callable[[Tensor], Tensor]  # (..., 2F) -> (..., F)


class ExpertAxis(NamedTuple):
    """A parameter or buffer with one slice per expert."""

    owner: nn.Module
    name: str
    axis: int  # of length E

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = getattr(self.owner, self.name)
        return tensor


@dataclass(frozen=True)
class MoELayerView:
    """One MoE layer of a loaded model."""

    index: int  # of the decoder layer
    position: int  # among the MoE layers: the first axis of the statistics
    layer: nn.Module
    block: nn.Module
    router: Router  # its output starts with the logits (T, E)
    experts: Experts
    shared: nn.Module | None
    family: Family
    own: int | None = None  # experts that are no padding; None: all

    @property
    def count(self) -> int:
        """E, the experts that are really there, padding among them."""
        return self.experts.num_experts

    @property
    def real(self) -> list[int]:
        """The ids of the experts that are no padding (padding.py)."""
        return places(self.count if self.own is None else self.own, self.count, self.groups[0])

    @property
    def top_k(self) -> int:
        return self.router.top_k

    @property
    def groups(self) -> tuple[int, int]:
        """Groups of experts, and how many of them a token may search."""
        if getattr(self.router, "topk_method", "") == "greedy":
            return 1, 1
        return getattr(self.router, "num_group", None) or 1, getattr(self.router, "topk_group", None) or 1

    @property
    def names(self) -> Names:
        return self.family.in_memory

    @property
    def router_weight(self) -> ExpertAxis:
        """The router's matrix, (E, D)."""
        return _locate(self.router, self.names.weight)

    @property
    def selection_bias(self) -> ExpertAxis | None:
        """What is added to the scores to choose experts, where the model has it."""
        if not self.names.selection_bias:
            return None
        found = _locate(self.block, self.names.selection_bias)
        return found if hasattr(found.owner, found.name) else None

    def expert_axes(self) -> Iterator[ExpertAxis]:
        """Every tensor that pruning, permuting or merging experts must change."""
        yield from self.router_axes()
        for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
            if isinstance(getattr(self.experts, name, None), Tensor):
                yield ExpertAxis(self.experts, name, 0)

    def router_axes(self) -> Iterator[ExpertAxis]:
        """Those of them that decide the routing."""
        yield self.router_weight
        if self.family.router_bias:
            yield ExpertAxis(self.router, "bias", 0)
        if self.selection_bias is not None:
            yield self.selection_bias


def config_of(model: nn.Module) -> PreTrainedConfig:
    """The configuration of a model of transformers."""
    config = model.config
    assert isinstance(config, PreTrainedConfig)
    return config


def _locate(module: nn.Module, path: str) -> ExpertAxis:
    """The tensor at a dotted path; its last axis is that of the experts, unless it is a matrix of the router."""
    head, _, name = path.rpartition(".")
    owner = module.get_submodule(head)
    tensor = getattr(owner, name, None)
    return ExpertAxis(owner, name, 0 if tensor is None or name == "weight" else tensor.ndim - 1)


def moe_layers(model: nn.Module) -> list[MoELayerView]:
    """The MoE layers of a causal language model in order; dense layers are skipped.

    Raises:
        InputRejected: no layer has experts, or the family is not supported.
    """
    config = config_of(model).to_dict()
    family = known_family(config) or family_of(config)
    names = family.in_memory
    own = config.get(EXPERTS_PER_LAYER) or []
    layers = list(model.get_submodule("model.layers").children())
    views: list[MoELayerView] = []
    for index, layer in enumerate(layers):
        block = getattr(layer, names.block, None)
        experts = getattr(block, "experts", None)
        if block is None or experts is None:
            continue
        router = block.get_submodule(names.router)
        shared = _submodule(layer, names.shared)
        real = own[len(views)] if own else None
        views.append(MoELayerView(index, len(views), layer, block, router, experts, shared, family, real))
    if not views:
        why = f"none of the {len(layers)} layers has experts"
        raise InputRejected("the model is not a mixture of experts", where=family.model_type, why=why)
    return views


def _submodule(layer: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, None where a model goes without."""
    found: nn.Module | None = layer if path else None
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def shared_matrices(view: MoELayerView) -> tuple[Tensor, Tensor, Tensor]:
    """gate (F, D), up (F, D) and down (D, F) of the shared expert; parameters of the model or views of them."""
    names, shared = view.names, view.shared
    assert shared is not None
    if names.shared_gate_up:
        gate, up = shared.get_parameter(names.shared_gate_up).chunk(2)
        return gate, up, shared.get_parameter(names.shared_down)
    gate, up, down = (shared.get_parameter(f"{name}.weight") for name in (names.gate, names.up, names.down))
    return gate, up, down


@torch.no_grad()
def route(view: MoELayerView, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(index_TK, weight_TK): exactly what the block hands to its experts for these inputs.

    Under `pruning.masked` the ids count the kept experts.
    """
    _, weight_TK, index_TK = _ask_router(view, hidden_TD)
    return index_TK, weight_TK


@torch.no_grad()
def router_scores(view: MoELayerView, hidden_TD: Tensor) -> Tensor:
    """The router's scores over all experts, (T, E) float32, before any selection bias: a softmax, or sigmoids."""
    return scores_of(view, _ask_router(view, hidden_TD)[0])


def scores_of(view: MoELayerView, logits_TE: Tensor) -> Tensor:
    """The scores that belong to the router's logits, (T, E) float32."""
    logits_TE = logits_TE.float()
    return logits_TE.sigmoid() if view.family.gating == "sigmoid" else logits_TE.softmax(dim=-1)


def _ask_router(view: MoELayerView, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (T, E), weights and ids (T, K)."""
    bias = view.selection_bias
    extra = (None if bias is None else bias.tensor,) if view.family.bias_argument else ()
    logits_TE, weight_TK, index_TK = view.router(hidden_TD, *extra)
    return logits_TE, weight_TK, index_TK


@torch.no_grad()
def expert_activations(view: MoELayerView, hidden_TD: Tensor, expert: int) -> Tensor:
    """The input of one expert's down projection, silu(gate(x)) * up(x) in most families: (T, F)."""
    experts = view.experts
    bias_G = experts.gate_up_proj_bias[expert] if experts.has_bias else None
    return experts._apply_gate(_linear(experts, hidden_TD, experts.gate_up_proj[expert], bias_G))


@torch.no_grad()
def down_project(view: MoELayerView, activation_TF: Tensor, expert: int) -> Tensor:
    """The raw output (before the gate weight) of one expert from `expert_activations`: (T, D)."""
    experts = view.experts
    bias_D = experts.down_proj_bias[expert] if experts.has_bias else None
    return _linear(experts, activation_TF, experts.down_proj[expert], bias_D)


def _linear(experts: Experts, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product in the inputs' dtype; streaming.py may hold experts in the smaller one that they are stored in."""
    weight = weight.to(inputs.dtype)
    return functional.linear(inputs, weight.T if experts.is_transposed else weight, bias)


@torch.no_grad()
def expert_outputs(view: MoELayerView, hidden_TD: Tensor, expert_ids: Sequence[int] | None = None) -> Tensor:
    """Raw outputs (before the gate weight) of the given experts on every token: (e, T, D).

    Args:
        expert_ids: which experts, in this order; None = all.
    """
    chosen = range(view.count) if expert_ids is None else expert_ids
    out_eTD = hidden_TD.new_empty(len(chosen), *hidden_TD.shape)
    for row, expert in enumerate(chosen):
        out_eTD[row] = down_project(view, expert_activations(view, hidden_TD, expert), expert)
    return out_eTD
