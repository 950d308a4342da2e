"""Importance of input columns by hand, and energies of neurons against a slow loop; safe where nothing was seen."""

import pytest
import torch

from moe_edge.formulas.importance import (
    PRIOR_TOKENS,
    SMALLEST_SHARE,
    kept_energy,
    mean_squares,
    neuron_energy,
    neurons_to_keep,
    strongest,
    weight_energy,
)


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


def test_energy_is_the_squared_norm_of_each_neurons_share_of_the_output():
    generator = torch.Generator().manual_seed(0)
    act_TF, down_DF = torch.randn(20, 5, generator=generator), torch.randn(3, 5, generator=generator)
    slow = [sum(float((act_TF[t, f] * down_DF[:, f]).double().square().sum()) for t in range(20)) for f in range(5)]
    assert torch.allclose(neuron_energy(act_TF.square().sum(0), down_DF), torch.tensor(slow).double(), rtol=1e-5)


def test_the_strongest_are_ascending_and_ties_go_to_the_lower_index():
    energy_F = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0])
    assert strongest(energy_F, 2).tolist() == [1, 2]
    assert strongest(energy_F, 4).tolist() == [0, 1, 2, 4]
    assert kept_energy(energy_F, torch.tensor([1, 2])) == pytest.approx(0.6)
    for width in (0, 6):
        with pytest.raises(ValueError, match="cannot keep"):
            strongest(energy_F, width)


def test_without_evidence_the_weights_decide():
    gate_FD, up_FD, down_DF = torch.ones(4, 3), torch.ones(4, 3), torch.ones(3, 4)
    gate_FD[1] = 0.0
    down_DF[:, 2] *= 5
    assert weight_energy(gate_FD, up_FD, down_DF).tolist() == [27.0, 0.0, 675.0, 27.0]
    kept, share = neurons_to_keep(torch.zeros(4), gate_FD, up_FD, down_DF, 3)
    assert kept.tolist() == [0, 2, 3] and share == 1.0
    kept, _ = neurons_to_keep(torch.tensor([0.0, 9.0, 0.1, 9.0]), gate_FD, up_FD, down_DF, 2)
    assert kept.tolist() == [1, 3]
