"""dense: the kept experts side by side in one FFN per layer, without a router; a plain dense checkpoint.

Every expert's share of the output becomes a constant: its mean gate weight as the student would route, then, if it brings
the layer's output nearer to the teacher's, another factor. A shared expert joins with its mean gate. Such a student is the
start of a distillation (arXiv:2605.28207 spends billions of tokens on it), not a finished model.

Shape suffixes: T tokens, K kept experts, D model.
"""

from collections.abc import Callable

import torch

from moe_edge.compression.layers import Applied, Material, StudentLayer, kept_in, student_routing, work_on_layers
from moe_edge.compression.refit import LayerFit
from moe_edge.contracts.plan import Plan
from moe_edge.formulas.ffn import Ffn, concatenate, mean_gates
from moe_edge.models.dense import (
    build_dense,
    build_single_expert,
    check_single_expert,
    dense_type,
    shared_gate,
    shared_network,
)
from moe_edge.models.views import MoELayerView, moe_layers
from moe_edge.models.weights import expert_width, read_expert

RESCALINGS = 2  # sweeps over the experts' factors


def make_dense(applied: Applied, plan: Plan, material: Material) -> None:
    """Put a dense student in the place of `applied.model`, whose tensors it may share.

    Raises:
        ConfigError, InputRejected: neither a dense class nor a single expert can hold the student.
    """
    model = applied.model
    views = moe_layers(model)
    with_shared = dense_type(model) is not None
    if not with_shared:
        width = plan.expert_width or expert_width(views[0])
        check_single_expert(model, width * len(kept_in(plan, views[0])))
    networks: list[Ffn] = []
    work_on_layers(
        plan,
        material,
        applied,
        act=lambda layer: fix_gates(layer, with_shared),
        collect=lambda layer: networks.append(joined(layer, with_shared)),
    )
    applied.down_energy.clear()  # the columns of a dense FFN belong to no expert
    applied.model = (
        build_dense(model, networks) if with_shared else build_single_expert(model, networks, _weigher(applied))
    )


def fix_gates(layer: StudentLayer, with_shared: bool) -> None:
    """Replace the layer's routing by constants, as `layer.fit`; the shared expert's varying gate joins the target."""
    tokens = layer.tokens
    gates_E = mean_gates(layer.index_TK, layer.weight_TK, layer.view.count).float()
    target_TD = tokens.output_TD
    if with_shared and layer.view.shared is not None:
        gate_T1 = shared_gate(layer.view, tokens.hidden_TD)
        target_TD = target_TD + (gate_T1 - gate_T1.mean()) * layer.view.shared(tokens.hidden_TD)
    index_TK = torch.tensor(layer.kept, device=gates_E.device).expand(len(tokens.hidden_TD), -1)
    layer.fit = LayerFit(layer.view, tokens.hidden_TD, target_TD, index_TK, gates_E[layer.kept].expand_as(index_TK))
    layer.record["missed_at_mean_gates"] = layer.fit.missed
    for _ in range(RESCALINGS):
        layer.fit.rescale()


def joined(layer: StudentLayer, with_shared: bool) -> Ffn:
    """The layer's network: every kept expert at its constant, and the shared expert at its mean gate."""
    parts = [read_expert(layer.view, expert) for expert in layer.kept]
    scales = [float(layer.fit.slots[expert][1][0]) for expert in layer.kept]
    shared = shared_network(layer.view) if with_shared else None
    if shared is not None:
        parts.append(shared)
        scales.append(float(shared_gate(layer.view, layer.tokens.hidden_TD).mean()))
    return concatenate(parts, scales)


def _weigher(applied: Applied) -> Callable[[MoELayerView], float]:
    def weigh(view: MoELayerView) -> float:
        parameter = next(view.experts.parameters())
        hidden_1D = torch.zeros(1, applied.model.config.hidden_size, dtype=parameter.dtype, device=parameter.device)
        return float(student_routing(applied.model, view, hidden_1D, [0], 1)[1][0, 0])

    return weigh
