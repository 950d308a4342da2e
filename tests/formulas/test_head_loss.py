"""The chunked head loss gives the plain computation's value and gradients."""

import pytest
import torch
from torch import Tensor

from moe_edge.formulas.divergence import CHUNK_TOKENS, cross_entropy
from moe_edge.formulas.head_loss import head_loss

TOKENS, WIDTH, VOCAB = CHUNK_TOKENS + 37, 16, 50


def inputs(frozen_head: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(TOKENS, WIDTH).requires_grad_()
    weight = torch.randn(VOCAB + 6, WIDTH).requires_grad_(not frozen_head)
    return hidden, weight, torch.randint(0, VOCAB, (TOKENS,))


@pytest.mark.parametrize("frozen_head", (False, True))
def test_equals_the_plain_computation(frozen_head: bool) -> None:
    hidden, weight, labels = inputs(frozen_head)

    def both(logits: Tensor, span: slice) -> dict[str, tuple[float, Tensor]]:
        return {"ce": (0.5, cross_entropy(logits, labels[span]).sum()), "l2": (2.0, logits.square().sum())}

    loss, sums = head_loss(3 * hidden, weight[:VOCAB], both)
    wanted = [hidden] if frozen_head else [hidden, weight]
    ours = torch.autograd.grad(0.25 * loss, wanted)
    logits = 3 * hidden @ weight[:VOCAB].T
    ce, l2 = cross_entropy(logits, labels).sum(), logits.square().sum()
    plain = torch.autograd.grad(0.25 * (0.5 * ce + 2 * l2), wanted)
    torch.testing.assert_close(loss, 0.5 * ce + 2 * l2)
    assert sums["ce"] == pytest.approx(float(ce.detach()), rel=1e-5)
    assert sums["l2"] == pytest.approx(float(l2.detach()), rel=1e-5)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_without_gradients() -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        loss, _ = head_loss(
            hidden, weight, lambda logits, span: {"ce": (1.0, cross_entropy(logits, labels[span]).sum())}
        )
    assert not loss.requires_grad
    torch.testing.assert_close(loss, cross_entropy(hidden @ weight.T, labels).sum())
