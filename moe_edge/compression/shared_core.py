"""shared-core: one FFN per layer for all kept experts, with a low-rank input and output wrapper per expert.

The seed document "Knowledge Distillation for Compressed MoE Models" names the parts (shared_core, input_wrapper,
output_wrapper) and asks for a zero-shot initialisation; here it is an alternating least-squares fit on calibration tokens
(formulas/shared_core.py). The student is trainable in this form and folds into ordinary experts for export, so it saves
parameters to train, not bytes on a device.

Shape suffixes: N tokens of an expert, E' kept experts, D model, F width, R rank.
"""

from typing import Any

import torch

from moe_edge.compression.layers import Applied, Material, StudentLayer, work_on_layers
from moe_edge.compression.refit import LayerFit
from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.plan import Plan
from moe_edge.formulas.shared_core import ExpertData, SharedCore, fit_shared_core, fold
from moe_edge.models.pruning import prune
from moe_edge.models.shared_core import SharedCoreExperts, shared_core_model
from moe_edge.models.views import MoELayerView, down_project, moe_layers
from moe_edge.models.weights import read_expert, write_expert

DEFAULT_RANK = 16
SAMPLE_TOKENS = 512  # on which the neurons of two experts are compared


def share_core(applied: Applied, plan: Plan, material: Material) -> None:
    """Put a student with shared cores in the place of `applied.model`, which is used up.

    Raises:
        InputRejected: experts with biases or a layout of their own.
    """
    model = applied.model
    for view in moe_layers(model):
        _refuse_unlike(view)
    rank = plan.shared_rank or DEFAULT_RANK
    fitted: list[SharedCore] = []
    work_on_layers(plan, material, applied, act=lambda layer: fitted.append(fit_layer(layer, rank)))
    prune(model, plan.kept, plan.top_k)
    applied.model = shared_core_model(model, rank)
    modules = [module for module in applied.model.modules() if isinstance(module, SharedCoreExperts)]
    for module, core in zip(modules, fitted, strict=True):
        fill(module, core)


def _refuse_unlike(view: MoELayerView) -> None:
    experts = view.experts
    odd = getattr(experts, "has_bias", False) or getattr(experts, "is_transposed", False)
    if odd or not getattr(experts, "is_concatenated", True):
        why = f"{type(experts).__name__} has biases or a layout of its own"
        raise InputRejected("the action shared-core does not know experts of this kind", why=why)


def fit_layer(layer: StudentLayer, rank: int) -> SharedCore:
    """Fit one layer and write the folded experts into it, so that what follows sees the student's answers."""
    gate = layer.view.experts.act_fn
    assert callable(gate)
    data = [expert_data(layer, expert) for expert in layer.kept]
    core = fit_shared_core(data, layer.tokens.hidden_TD[:SAMPLE_TOKENS], rank, lambda one, other: gate(one) * other)
    for expert, wrapper in zip(layer.kept, core.wrappers, strict=True):
        write_expert(layer.view, expert, fold(core.core, wrapper))
    layer.record |= _history(core)
    tokens = layer.tokens
    layer.fit = LayerFit(layer.view, tokens.hidden_TD, tokens.output_TD, layer.index_TK, layer.weight_TK)
    return core


def expert_data(layer: StudentLayer, expert: int) -> ExpertData:
    """What the expert answers on the tokens that the student routes to it."""
    weights = read_expert(layer.view, expert)
    if expert not in layer.fit.slots:
        nothing_0D = layer.tokens.hidden_TD[:0].float()
        return ExpertData(weights, nothing_0D, nothing_0D[:, 0], nothing_0D)
    token_N, gate_N = layer.fit.slots[expert]
    output_ND = down_project(layer.view, layer.fit.activations(expert), expert)
    return ExpertData(weights, layer.tokens.hidden_TD[token_N], gate_N, output_ND)


def _history(core: SharedCore) -> dict[str, Any]:
    return {"experts_missed_at_start": core.history[0], "experts_missed": core.history[-1]}


@torch.no_grad()
def fill(module: SharedCoreExperts, fitted: SharedCore) -> None:
    """Copy a fit into the module, in the module's dtype."""
    core, wrappers = fitted.core, fitted.wrappers
    module.shared_core.gate_up_proj.copy_(torch.cat([core.gate_FD, core.up_FD]))
    module.shared_core.down_proj.copy_(core.down_DF)
    module.input_wrapper.left.copy_(torch.stack([wrapper.in_left_DR for wrapper in wrappers]))
    module.input_wrapper.right.copy_(torch.stack([wrapper.in_right_RD for wrapper in wrappers]))
    module.output_wrapper.left.copy_(torch.stack([wrapper.out_left_DR for wrapper in wrappers]))
    module.output_wrapper.right.copy_(torch.stack([wrapper.out_right_RD for wrapper in wrappers]))
    assert module.output_wrapper.scale is not None  # only an input has none
    module.output_wrapper.scale.copy_(torch.tensor([wrapper.out_scale for wrapper in wrappers]))
