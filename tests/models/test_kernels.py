"""Our experts kernels against the stock loop of transformers, outputs and every gradient; and all experts on the same tokens
with gradients, equal to the ones without, in every family and with shared cores."""

import pytest
import torch

from moe_edge.models.kernels import ALL_AT_ONCE, DENSE_SHARE, SORTED_LOOP, differentiable_outputs, fastest_kernel
from moe_edge.models.shared_core import shared_core_model
from moe_edge.models.views import expert_outputs, moe_layers
from tests.tiny import ALL_FAMILIES, tiny_model


def run(model, kernel: str) -> list[torch.Tensor]:
    model.set_experts_implementation(kernel)
    model.zero_grad()
    ids_BS = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.manual_seed(3))
    logits_BSV = model(input_ids=ids_BS).logits
    logits_BSV.square().mean().backward()
    return [logits_BSV.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.requires_grad)]


@pytest.mark.parametrize("kernel", [SORTED_LOOP, ALL_AT_ONCE])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_kernel_equals_the_stock_loop(family: str, kernel: str) -> None:
    model = tiny_model(family).float()
    for ours, stock in zip(run(model, kernel), run(model, "eager"), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel", [SORTED_LOOP, ALL_AT_ONCE])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_half_precision_with_float32_gates(family: str, kernel: str) -> None:
    """Many routers hand out float32 weights in a bfloat16 model, as a capture with --dtype bfloat16 has on a CPU."""
    model = tiny_model(family).to(torch.bfloat16)
    experts = moe_layers(model)[0].experts
    hidden_TD = torch.randn(9, model.config.hidden_size, generator=torch.manual_seed(0)).bfloat16()
    index_TK = torch.arange(18).view(9, 2) % experts.num_experts
    weight_TK = torch.rand(9, 2, generator=torch.manual_seed(1))
    found = []
    for name in (kernel, "eager"):
        model.set_experts_implementation(name)
        with torch.no_grad():
            found.append(experts(hidden_TD, index_TK, weight_TK))
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found[0], found[1], rtol=0.03, atol=0.03 * float(found[1].abs().max()))


def test_dense_products_are_for_routers_that_use_most_experts() -> None:
    assert fastest_kernel(8, 10) == fastest_kernel(8, 16) == ALL_AT_ONCE
    assert fastest_kernel(4, 10) == fastest_kernel(8, 128) == SORTED_LOOP
    assert 0 < DENSE_SHARE <= 1


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_differentiable_outputs_are_the_measured_ones(family: str) -> None:
    view = moe_layers(tiny_model(family, layers=4))[-1]
    hidden = torch.randn(5, 64, requires_grad=True)
    outputs = differentiable_outputs(view, hidden)
    torch.testing.assert_close(outputs.detach(), expert_outputs(view, hidden))
    outputs[1].square().sum().backward()
    slope = view.experts.down_proj.grad
    assert hidden.grad.any() and slope[1].any() and not slope[0].any()


def test_differentiable_outputs_of_shared_cores() -> None:
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
