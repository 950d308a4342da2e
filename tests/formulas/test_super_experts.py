"""The guard finds the loud few, at most one in two hundred, and nothing where nothing was routed."""

from types import SimpleNamespace

import torch

from moe_edge.formulas.super_experts import super_experts


def _found(norm_max_LE: torch.Tensor) -> list[list[int]]:
    return super_experts(SimpleNamespace(norm_max_LE=norm_max_LE)).nonzero().tolist()


def test_planted_super_experts_are_found() -> None:
    norms = torch.rand(8, 128, generator=torch.Generator().manual_seed(0)) + 1
    norms[1, 68], norms[2, 92], norms[3, 82] = 900.0, 600.0, 300.0
    assert _found(norms) == [[1, 68], [2, 92], [3, 82]]


def test_loud_is_relative_to_the_loudest() -> None:
    norms = torch.rand(8, 128, generator=torch.Generator().manual_seed(0)) + 1
    norms[1, 68], norms[2, 92] = 900.0, 80.0
    assert _found(norms) == [[1, 68]]


def test_a_small_model_has_one_at_most() -> None:
    assert _found(torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.5, 1.0, 1.0, 0.0]])) == [[1, 0]]
    assert _found(torch.zeros(2, 4)) == [] and _found(torch.ones(2, 4)) == []
