"""The constants of a dense student are mean gate weights."""

import torch

from moe_edge.formulas.dense import mean_gates


def test_mean_gates_count_every_token():
    index_TK = torch.tensor([[0, 2], [2, 1], [2, 0]])
    weight_TK = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]])
    expected = torch.tensor([(0.6 + 0.5) / 3, 0.1 / 3, (0.4 + 0.9 + 0.5) / 3, 0.0])
    assert torch.allclose(mean_gates(index_TK, weight_TK, 4).float(), expected)
    assert not mean_gates(index_TK[:0], weight_TK[:0], 4).any()
