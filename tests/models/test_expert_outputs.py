"""All experts on the same tokens with gradients: equal to the ones without, in every family and with shared cores."""

import pytest
import torch

from moe_edge.models.kernels import differentiable_outputs
from moe_edge.models.shared_core import shared_core_model
from moe_edge.models.views import expert_outputs, moe_layers
from tests.tiny import ALL_FAMILIES, tiny_model


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_equal_to_the_measuring_twin(family: str) -> None:
    view = moe_layers(tiny_model(family, layers=4))[-1]
    hidden = torch.randn(5, 64, requires_grad=True)
    outputs = differentiable_outputs(view, hidden)
    torch.testing.assert_close(outputs.detach(), expert_outputs(view, hidden))
    outputs[1].square().sum().backward()
    slope = view.experts.down_proj.grad
    assert hidden.grad.any() and slope[1].any() and not slope[0].any()


def test_shared_cores() -> None:
    model = shared_core_model(tiny_model("qwen3_moe"), rank=4)
    with torch.no_grad():
        for parameter in moe_layers(model)[0].experts.parameters():
            parameter.normal_(std=0.1)
    view, hidden = moe_layers(model)[0], torch.randn(5, 64)
    outputs = differentiable_outputs(view, hidden)
    weights = torch.nn.functional.one_hot(torch.arange(6)).float()
    for expert in range(6):
        alone = view.experts(hidden, torch.full((5, 1), expert), weights[expert, expert].expand(5, 1))
        torch.testing.assert_close(outputs[expert], alone)
    outputs[2].sum().backward()
    assert view.experts.shared_core.down_proj.grad.any() and view.experts.input_wrapper.left.grad[2].any()
