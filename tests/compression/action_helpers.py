"""What the tests of the actions share: models with a planted structure, their statistics, plans and distances."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.compression.layers import Material
from moe_edge.contracts.plan import Estimate, Plan
from moe_edge.formulas.cka import hsic_all_pairs, normalise_rows
from moe_edge.models.taps import body
from moe_edge.models.views import MoELayerView, expert_activations, expert_outputs, moe_layers, router_scores
from moe_edge.models.weights import read_expert, write_expert
from tests.tiny import tiny_ids, tiny_model

ROWS = tiny_ids(tokens=32, rows=8)
PAIRS = 4  # experts 4..7 are made of 0..3
KEPT = {0: [0, 2, 3, 5], 1: [1, 2, 3, 4]}  # of 6 experts
HALF = {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}


def plan_of(kept: dict[int, list[int]], **changes: object) -> Plan:
    """A plan for the tiny models (6 experts, top-2) that keeps 4 per layer."""
    estimate = Estimate(
        params_total=1, params_active=1, file_bytes=1, kv_cache_bytes=1, peak_memory_bytes=1, routed_expert_share_kept=1
    )
    values: dict[str, object] = {
        "criterion": "frequency",
        "experts_total": 6,
        "experts_kept": 4,
        "top_k": 2,
        "kept": kept,
        "quantization": "Q8_0",
        "onnx_precision": "int8",
        "predicted_kl_nats": 0.1,
        "estimate": estimate,
    }
    return Plan.model_validate(values | changes)


@torch.no_grad()
def planted(kind: str, noise: float = 0.0, family: str = "qwen3_moe") -> PreTrainedModel:
    """8 experts, top-4; 4..7 have the router rows of 0..3 and are neuron-permuted ("permuted") or output-rotated
    ("rotated") copies of them, blurred by `noise` (relative)."""
    model = tiny_model(family, experts=2 * PAIRS, top_k=4)
    generator = torch.Generator().manual_seed(7)
    for view in moe_layers(model):
        view.router.weight[PAIRS:] = view.router.weight[:PAIRS]
        for expert in range(PAIRS):
            weights = read_expert(view, expert)
            if kind == "permuted":
                weights = weights.select(torch.randperm(len(weights.gate_FD), generator=generator))
            else:
                hidden = len(weights.down_DF)
                rotation = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator)).Q
                weights = weights._replace(down_DF=rotation @ weights.down_DF)
            blurred = [w + noise * w.std() * torch.randn(w.shape, generator=generator) for w in weights[:3]]
            write_expert(
                view, PAIRS + expert, weights._replace(gate_FD=blurred[0], up_FD=blurred[1], down_DF=blurred[2])
            )
    return model


@torch.no_grad()
def block_inputs(model: PreTrainedModel, ids_NS: Tensor = ROWS) -> list[Tensor]:
    """What the experts of every layer read, [T, D] each."""
    inputs_of: list[Tensor] = []
    hooks = [
        view.experts.register_forward_pre_hook(lambda module, inputs: inputs_of.append(inputs[0]))
        for view in moe_layers(model)
    ]
    body(model)(input_ids=ids_NS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs_of


@torch.no_grad()
def statistics_of(model: PreTrainedModel, ids_NS: Tensor = ROWS) -> Any:
    """The fields of the profile's statistics that actions read, from all experts on all tokens."""
    views, hidden = moe_layers(model), block_inputs(model, ids_NS)
    hsic, gated, squares = [], [], []
    for view, hidden_TD in zip(views, hidden, strict=True):
        features_ETD = normalise_rows(expert_outputs(view, hidden_TD))
        gate_ET = router_scores(view, hidden_TD).T
        hsic.append(hsic_all_pairs(features_ETD))
        gated.append(hsic_all_pairs(features_ETD * gate_ET.unsqueeze(-1)))
        squares.append(torch.stack([_energy(view, hidden_TD, expert) for expert in range(view.count)]))
    hsic_LEE, layers, experts = torch.stack(hsic), len(views), views[0].count
    imatrix = {
        "expert_down": torch.stack(squares),
        "expert_in": torch.ones(layers, experts, hidden[0].shape[1]),
        "expert_count": torch.full((layers, experts), len(hidden[0])),
    }
    return SimpleNamespace(
        hsic_LEE=hsic_LEE,
        gated_hsic_LEE=torch.stack(gated),
        null_hsic_LEE=torch.zeros_like(hsic_LEE),
        imatrix=imatrix,
    )


def _energy(view: MoELayerView, hidden_TD: Tensor, expert: int) -> Tensor:
    return expert_activations(view, hidden_TD, expert).double().square().sum(dim=0)


def material(model: PreTrainedModel, ids_NS: Tensor = ROWS) -> Material:
    return Material(statistics_of(model, ids_NS), ids_NS)


def plan8(**changes: Any) -> Plan:
    """A plan for the planted models: 4 of 8 experts, top-2."""
    return plan_of(changes.pop("kept", HALF), **({"experts_total": 8, "experts_kept": 4, "top_k": 2} | changes))


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids_NS: Tensor = ROWS) -> Tensor:
    return model(ids_NS).logits.double().log_softmax(-1)


def kl_nats(teacher_NSV: Tensor, student_NSV: Tensor) -> float:
    """Mean KL(teacher || student) per token from log-probabilities."""
    return float((teacher_NSV.exp() * (teacher_NSV - student_NSV)).sum(-1).mean())
