"""Mean squares of input columns: by hand, and safe where nothing was seen."""

import torch

from moe_edge.formulas.importance import PRIOR_TOKENS, SMALLEST_SHARE, mean_squares


def test_an_expert_is_blended_with_the_mean_of_all():
    sums, counts = torch.tensor([[30.0, 10.0], [0.0, 4.0]]).double(), torch.tensor([10.0, 2.0]).double()
    mean = torch.tensor([30.0, 14.0]).double() / 12
    expected = (sums + PRIOR_TOKENS * mean) / (counts[:, None] + PRIOR_TOKENS)
    torch.testing.assert_close(mean_squares(sums, counts), expected.float())


def test_much_evidence_outweighs_the_prior():
    sums, counts = torch.tensor([[1e9, 0.0], [0.0, 1e9]]).double(), torch.tensor([1e6, 1e6]).double()
    found = mean_squares(sums, counts)
    assert found[0, 0] > 999 and 0 < found[0, 1] < 0.1, "an unused column keeps a small positive weight"


def test_no_evidence_is_unweighted():
    zero = torch.zeros(2, 3, dtype=torch.float64)
    assert torch.equal(mean_squares(zero, torch.zeros(2).double()), torch.ones(2, 3))
    assert torch.equal(mean_squares(zero, torch.ones(2).double()), torch.ones(2, 3))
    assert torch.equal(mean_squares(zero + float("inf"), torch.ones(2).double()), torch.ones(2, 3))


def test_columns_that_no_token_used_keep_an_order_of_magnitude():
    found = mean_squares(torch.tensor([[8.0, 0.0]]).double(), torch.tensor([4.0]).double())
    assert found[0, 1] == torch.tensor(SMALLEST_SHARE * 1.0, dtype=torch.float32) and found.dtype == torch.float32
