"""Our experts kernels against the stock loop of transformers: outputs and every gradient."""

import pytest
import torch

from moe_edge.families.kernels import ALL_AT_ONCE, DENSE_SHARE, SORTED_LOOP, fastest_kernel
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


def test_dense_products_are_for_routers_that_use_most_experts() -> None:
    assert fastest_kernel(8, 10) == fastest_kernel(8, 16) == ALL_AT_ONCE
    assert fastest_kernel(4, 10) == fastest_kernel(8, 128) == SORTED_LOOP
    assert 0 < DENSE_SHARE <= 1
