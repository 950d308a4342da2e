"""Tiles of the head against the whole logits in float64, values and gradients; and nothing wider than a tile is made."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_edge.formulas import head_tiles
from moe_edge.formulas.divergence import cached_kl, coarse_pair, teacher_topk
from moe_edge.formulas.head_tiles import kept_logits
from moe_edge.formulas.logit_views import LogitView, WholeLogits
from moe_edge.formulas.pair_divergence import jsd, reverse_kl
from moe_edge.formulas.sampling import draw, sampled_kl

TOKENS, WIDTH, VOCAB = 41, 12, 157
Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_tiles, "TILE_TOKENS", 16)
    monkeypatch.setattr(head_tiles, "TILE_IDS", 50)


@pytest.fixture
def inputs() -> Inputs:
    """Hidden states, a head and the logits of a teacher, float64."""
    teacher = 3 * torch.randn(TOKENS, VOCAB, dtype=torch.float64)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64).requires_grad_()
    return hidden, torch.randn(VOCAB, WIDTH, dtype=torch.float64).requires_grad_(), teacher


def _slopes(loss: Tensor, leaves: tuple[Tensor, ...]) -> Iterator[Tensor]:
    yield loss.detach()
    yield from torch.autograd.grad(loss, leaves)


def _pairs(
    inputs: Inputs, ids: Tensor, temperatures: list[float], labels: Tensor | None, loss: Any
) -> list[tuple[Tensor, Tensor]]:
    """A loss and its gradients of hidden states and head: on tiles, on whole logits."""
    hidden, weight, _ = inputs
    tiled: LogitView = kept_logits(hidden, weight, ids, temperatures, labels)
    whole: LogitView = WholeLogits(hidden @ weight.T)
    return list(zip(*(_slopes(loss(view), (hidden, weight)) for view in (tiled, whole)), strict=True))


@pytest.mark.parametrize("temperature", (1.0, 2.0))
@pytest.mark.parametrize("k", (1, 8, VOCAB))
@pytest.mark.parametrize("divergence", ("kl", "reverse_kl", "jsd"))
def test_the_blend_with_a_cached_teacher(inputs: Inputs, temperature: float, k: int, divergence: str) -> None:
    top = teacher_topk(inputs[2], k, (temperature,))
    labels = torch.where(torch.arange(TOKENS) % 2 == 0, top.indices_TK[:, -1], top.indices_TK[:, 0].flip(0))
    of: dict[str, Callable[..., Tensor]] = {"reverse_kl": reverse_kl, "jsd": jsd}

    def loss(student: LogitView) -> Tensor:
        kept = (top.indices_TK, top.logprobs_TK, top.tail_logmass_TH[:, 0], temperature)
        value = cached_kl(student, *kept) if divergence == "kl" else of[divergence](*coarse_pair(student, *kept))
        return 0.3 * student.cross_entropy(labels).sum() + value.sum()

    for ours, plain in _pairs(inputs, top.indices_TK, sorted({1.0, temperature}), labels, loss):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_random_draws_whose_rows_are_filled_up(inputs: Inputs, temperature: float) -> None:
    drawn = draw(inputs[2], 20, temperature, torch.Generator().manual_seed(0))
    assert (drawn.counts_TU == 0).any()
    ids = drawn.indices_TU.masked_fill(drawn.counts_TU == 0, -1)
    pairs = _pairs(inputs, ids, [temperature], None, lambda student: sampled_kl(student, *drawn, temperature).sum())
    for ours, plain in pairs:
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


def test_cross_entropy_alone(inputs: Inputs) -> None:
    labels = torch.randint(0, VOCAB, (TOKENS,))
    nothing = torch.empty((TOKENS, 0), dtype=torch.long)
    pairs = _pairs(inputs, nothing, [1.0], labels, lambda student: student.cross_entropy(labels).sum())
    for ours, plain in pairs:
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


def test_a_frozen_head_has_no_gradient(inputs: Inputs) -> None:
    hidden, weight, teacher = inputs
    ids = teacher.topk(4).indices
    view = kept_logits(hidden, weight.detach(), ids, [1.0])
    (ours,) = torch.autograd.grad((view.log_all(1.0) + view.at(ids).sum(-1)).sum(), hidden)
    whole = WholeLogits(hidden @ weight.detach().T)
    (plain,) = torch.autograd.grad((whole.log_all(1.0) + whole.at(ids).sum(-1)).sum(), hidden)
    torch.testing.assert_close(ours, plain)
    assert weight.grad is None


def test_bfloat16_is_summed_up_in_float32(inputs: Inputs) -> None:
    hidden, weight = (tensor.detach().bfloat16().requires_grad_() for tensor in inputs[:2])
    ids = inputs[2].topk(4).indices
    view, whole = kept_logits(hidden, weight, ids, [1.0]), WholeLogits(hidden @ weight.T)
    assert view.log_all(1.0).dtype == view.at(ids).dtype == torch.float32
    torch.testing.assert_close(view.log_all(1.0), whole.log_all(1.0), rtol=1e-5, atol=1e-5)
    ours, plain = (torch.autograd.grad(one.log_all(1.0).sum(), (hidden, weight)) for one in (view, whole))
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("label", (-100, VOCAB))
def test_a_label_outside_of_the_vocabulary_is_an_error(inputs: Inputs, label: int) -> None:
    labels = torch.full((TOKENS,), label)
    with pytest.raises(ValueError, match=f"{VOCAB} ids"):
        kept_logits(*inputs[:2], torch.empty((TOKENS, 0), dtype=torch.long), [1.0], labels)


def test_it_knows_no_other_ids(inputs: Inputs) -> None:
    view = kept_logits(*inputs[:2], inputs[2].topk(4).indices, [1.0])
    with pytest.raises(ValueError, match="other ids"):
        view.at(inputs[2].topk(5).indices)


class _Widest(TorchDispatchMode):
    """The most elements that any operation wrote, forward or backward."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [one for one in (out if isinstance(out, tuple | list) else [out]) if isinstance(one, Tensor)]
        self.most = max([self.most, *(one.numel() for one in found)])
        return out


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_neither_logits_nor_their_gradient_are_ever_whole(inputs: Inputs, temperature: float) -> None:
    hidden, weight, teacher = inputs
    top, labels = teacher_topk(teacher, 4, (temperature,)), torch.randint(0, VOCAB, (TOKENS,))
    with _Widest() as widest:
        view = kept_logits(hidden, weight, top.indices_TK, sorted({1.0, temperature}), labels)
        kl = cached_kl(view, top.indices_TK, top.logprobs_TK, top.tail_logmass_TH[:, 0], temperature)
        torch.autograd.grad((kl + view.cross_entropy(labels)).sum(), (hidden, weight))
    assert widest.most == VOCAB * WIDTH < TOKENS * VOCAB  # the head's gradient
