"""Ridge maps against the normal equations; low-rank maps against a direct minimisation of the same objective."""

from functools import partial

import pytest
import torch

from moe_edge.formulas.least_squares import joint_ridge_maps, low_rank_map, ridge_map, ridge_maps, ridge_strength


def numbers(tokens: int, inputs: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, inputs, generator=generator), torch.randn(tokens, outputs, generator=generator)


def low_rank(inputs_TA, target_TD, rank, ridge):
    wide_TA = inputs_TA.double()
    gram_AA, products_AD = wide_TA.T @ wide_TA, wide_TA.T @ target_TD.double()
    return low_rank_map(gram_AA, products_AD, rank, ridge_strength([inputs_TA], ridge))


def objective(inputs_TA, target_TD, map_DA, strength):
    missed = (target_TD.double() - inputs_TA.double() @ map_DA.T).square().sum()
    return float(missed + strength * map_DA.square().sum())


@pytest.mark.parametrize("tokens", [5, 40])  # fewer and more tokens than inputs: the dual and the primal form
def test_the_ridge_map_solves_the_normal_equations(tokens):
    inputs_TA, target_TD = numbers(tokens, 12, 7)
    strength = 0.3 * float(inputs_TA.double().square().sum()) / 12
    assert strength == pytest.approx(ridge_strength([inputs_TA], 0.3))
    gram = inputs_TA.double().T @ inputs_TA.double() + strength * torch.eye(12, dtype=torch.float64)
    expected = torch.linalg.solve(gram, inputs_TA.double().T @ target_TD.double()).T
    assert torch.allclose(ridge_map(inputs_TA, target_TD, 0.3), expected, atol=1e-10)
    several = ridge_maps(inputs_TA, target_TD, [0.01, 0.3])
    assert torch.equal(several[1], ridge_map(inputs_TA, target_TD, 0.3)) and several[0].norm() > several[1].norm()


def test_an_exact_map_is_found_and_silent_inputs_give_zero():
    inputs_TA, _ = numbers(50, 6, 1)
    truth_DA = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
    found = ridge_map(inputs_TA, inputs_TA.double() @ truth_DA.T, 1e-12)
    assert torch.allclose(found, truth_DA, atol=1e-8)
    assert torch.equal(ridge_map(torch.zeros(5, 3), torch.ones(5, 2), 0.1), torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [9, 40])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("outputs", [7, 20], ids=["fewer outputs", "more outputs"])  # than inputs
def test_the_low_rank_map_is_the_best_of_its_rank(tokens, rank, outputs):
    inputs_TA, target_TD = numbers(tokens, 12, outputs)
    strength = ridge_strength([inputs_TA], 0.05)
    left_DR, right_RA = low_rank(inputs_TA, target_TD, rank, 0.05)
    found = objective(inputs_TA, target_TD, left_DR @ right_RA, strength)
    left, right = left_DR.clone(), right_RA.clone()
    for _ in range(30):  # exact alternating minimisation from there cannot do better
        gram = right @ (inputs_TA.double().T @ inputs_TA.double() + strength * torch.eye(12)) @ right.T
        left = torch.linalg.solve(gram, right @ inputs_TA.double().T @ target_TD.double()).T
        basis = torch.linalg.qr(left).Q
        right = basis.T @ ridge_map(inputs_TA, target_TD, 0.05)
        left = basis
    assert objective(inputs_TA, target_TD, left @ right, strength) == pytest.approx(found, rel=1e-9)
    assert found < min(
        objective(inputs_TA, target_TD, torch.randn(outputs, rank).double() @ torch.randn(rank, 12).double(), strength)
        for _ in range(20)
    )


def test_a_full_rank_is_the_ridge_map_and_spare_directions_are_zero():
    inputs_TA, target_TD = numbers(30, 5, 4)
    left_DR, right_RA = low_rank(inputs_TA, target_TD, 4, 0.1)
    assert torch.allclose(left_DR @ right_RA, ridge_map(inputs_TA, target_TD, 0.1), atol=1e-10)
    left_DR, right_RA = low_rank(inputs_TA, target_TD, 9, 0.1)
    assert left_DR.shape == (4, 9) and not left_DR[:, 4:].any() and not right_RA[4:].any()
    left_DR, right_RA = low_rank(torch.zeros(3, 5), target_TD[:3], 2, 0.1)
    assert not (left_DR @ right_RA).any()


@pytest.mark.parametrize("tokens", [12, 60], ids=["over tokens", "over inputs"])
def test_joint_maps_are_one_regression_on_the_blocks_side_by_side(tokens):
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    target_TD = draw(tokens, 3)
    blocks = []
    for width, step in ((9, 1), (7, 2), (5, 3)):
        token_N = torch.arange(0, tokens, step)
        blocks.append((token_N, draw(len(token_N), width)))
    columns = []
    for token_N, inputs_NA in blocks:
        column_TA = torch.zeros(tokens, inputs_NA.shape[1], dtype=torch.float64)
        column_TA[token_N] = inputs_NA
        columns.append(column_TA)
    joined = torch.cat(columns, dim=1)
    for ridge, maps in zip((0.01, 0.5), joint_ridge_maps(blocks, target_TD, (0.01, 0.5)), strict=True):
        strength = ridge * joined.square().sum() / joined.shape[1]
        system = joined.T @ joined + strength * torch.eye(joined.shape[1], dtype=torch.float64)
        expected = torch.linalg.solve(system, joined.T @ target_TD).T
        assert torch.allclose(torch.cat(maps, dim=1), expected, rtol=1e-8, atol=1e-10)


def test_joint_maps_of_silent_inputs_are_zero():
    (maps,) = joint_ridge_maps([(torch.arange(4), torch.zeros(4, 3))], torch.ones(4, 2), [0.1])
    assert maps[0].shape == (2, 3) and not maps[0].any()
