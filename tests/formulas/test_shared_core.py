"""The alternating fit: its error never rises, it finds a planted core, and it beats wrappers and cores drawn at random."""

from dataclasses import replace

import pytest
import torch

from moe_edge.formulas.ffn import Ffn
from moe_edge.formulas.shared_core import (
    AlternatingFit,
    ExpertData,
    ExpertWrapper,
    best_output,
    conjugate_gradients,
    core_activations,
    fit_shared_core,
    fold,
    identity,
    moments,
    output_map,
    silu_gate,
    transposed_output,
)

HIDDEN, WIDTH, RANK, TOKENS = 10, 8, 2, 60


def core_of(generator: torch.Generator) -> Ffn:
    return Ffn(*(torch.randn(*shape, generator=generator) * 0.4 for shape in [(WIDTH, HIDDEN)] * 2 + [(HIDDEN, WIDTH)]))


def wrapper_of(generator: torch.Generator, size: float, scale: float = 1.0) -> ExpertWrapper:
    shapes = [(HIDDEN, RANK), (RANK, HIDDEN), (HIDDEN, RANK), (RANK, HIDDEN)]
    left, right, out_left, out_right = (size * torch.randn(*shape, generator=generator) for shape in shapes)
    return ExpertWrapper(left, right, scale, out_left, out_right)


def data_of(weights: Ffn, generator: torch.Generator) -> ExpertData:
    hidden_ND = torch.randn(TOKENS, HIDDEN, generator=generator)
    gate_N = torch.rand(TOKENS, generator=generator)
    return ExpertData(weights, hidden_ND, gate_N, core_activations(weights, hidden_ND, silu_gate) @ weights.down_DF.T)


def experts(size: float) -> tuple[list[ExpertData], torch.Tensor]:
    """Three experts that are bent copies of one core, their neurons in another order each; size 0 = exact copies."""
    generator = torch.Generator().manual_seed(0)
    core = core_of(generator)
    wrappers = [wrapper_of(generator, size, scale=1.0 + index * (size > 0)) for index in range(3)]
    orders = [torch.randperm(WIDTH, generator=generator) for _ in wrappers]
    data = [data_of(fold(core, one).select(order), generator) for one, order in zip(wrappers, orders, strict=True)]
    return data, torch.randn(40, HIDDEN, generator=generator)


def missed(data: list[ExpertData], networks: list[Ffn]) -> float:
    """The relative error, token by token."""
    lost = total = 0.0
    for one, network in zip(data, networks, strict=True):
        for hidden, gate, output in zip(one.hidden_ND, one.gate_N, one.output_ND, strict=True):
            answer = network.down_DF @ (torch.nn.functional.silu(network.gate_FD @ hidden) * (network.up_FD @ hidden))
            lost += float((gate * (output - answer)).double().square().sum())
            total += float((gate * output).double().square().sum())
    return lost / total


def test_the_folded_expert_computes_the_wrapped_core():
    generator = torch.Generator().manual_seed(1)
    core, wrapper = core_of(generator), wrapper_of(generator, 0.3, scale=0.7)
    hidden_ND = torch.randn(9, HIDDEN, generator=generator)
    core_ND = core_activations(core, wrapper.wrap_input(hidden_ND), silu_gate) @ core.down_DF.T
    wrapped = wrapper.out_scale * core_ND + (core_ND @ wrapper.out_right_RD.T) @ wrapper.out_left_DR.T
    folded = fold(core, wrapper)
    assert torch.allclose(core_activations(folded, hidden_ND, silu_gate) @ folded.down_DF.T, wrapped, atol=1e-5)
    image_DF = torch.randn(HIDDEN, WIDTH, generator=generator).double()
    matrix = (wrapper.out_scale * torch.eye(HIDDEN) + wrapper.out_left_DR @ wrapper.out_right_RD).double()
    assert torch.allclose(output_map(wrapper, core.down_DF), matrix @ core.down_DF.double(), atol=1e-5)
    assert torch.allclose(transposed_output(wrapper, image_DF), matrix.T @ image_DF, atol=1e-5)


def test_the_error_is_reported_truly_and_never_rises():
    data, sample = experts(0.3)
    fitted = fit_shared_core(data, sample, RANK)
    networks = [fold(fitted.core, wrapper) for wrapper in fitted.wrappers]
    assert missed(data, networks) == pytest.approx(fitted.history[-1], rel=1e-3)
    assert all(later <= earlier for earlier, later in zip(fitted.history, fitted.history[1:], strict=False))
    assert fitted.history[-1] < 0.8 * fitted.history[0]


def test_copies_of_one_core_are_reproduced():
    data, sample = experts(0.0)
    assert fit_shared_core(data, sample, RANK).history[-1] < 1e-6


def test_it_beats_a_random_start():
    data, sample = experts(0.3)
    fitted = fit_shared_core(data, sample, RANK)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        core = core_of(generator)
        noise = [fold(core, wrapper_of(generator, 0.1)) for _ in data]
        with_output_wrappers = AlternatingFit(data, core, RANK, silu_gate).total
        assert fitted.history[0] < with_output_wrappers < missed(data, noise)


def test_the_same_input_gives_the_same_fit_and_an_idle_expert_is_the_core():
    data, sample = experts(0.3)
    idle = ExpertData(data[0].weights, torch.zeros(0, HIDDEN), torch.zeros(0), torch.zeros(0, HIDDEN))
    fits = [fit_shared_core([*data, idle], sample, RANK) for _ in range(2)]
    assert fits[0].history == fits[1].history
    assert torch.equal(fold(fits[0].core, fits[0].wrappers[3]).down_DF, fits[0].core.down_DF)


def test_conjugate_gradients_solve_a_small_system():
    generator = torch.Generator().manual_seed(2)
    half = torch.randn(6, 6, generator=generator).double()
    matrix = half @ half.T + torch.eye(6)
    right = torch.randn(6, 2, generator=generator).double()
    assert torch.allclose(
        conjugate_gradients(lambda x: matrix @ x, right, 40), torch.linalg.solve(matrix, right), atol=1e-6
    )
    assert not conjugate_gradients(lambda x: matrix @ x, torch.zeros_like(right), 5).any()


@pytest.mark.parametrize("width", [WIDTH, HIDDEN + 2], ids=["narrower than the model", "wider"])
def test_the_output_wrapper_is_the_best_of_its_rank(width):
    """Against token-by-token errors: the sums are right, and no small change of the wrapper lowers the error."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(width, HIDDEN), (width, HIDDEN), (HIDDEN, width)]
    core = Ffn(*(0.4 * torch.randn(*shape, generator=generator) for shape in shapes))
    one = data_of(Ffn(*(0.4 * torch.randn(*shape, generator=generator) for shape in shapes)), generator)
    plain = identity(HIDDEN, RANK, core.gate_FD)
    sums = moments(one, plain, core, silu_gate)
    assert sums.missed(output_map(plain, core.down_DF)) == pytest.approx(missed([one], [core]) * one.energy, rel=1e-5)
    wrapper, error = best_output(plain, core.down_DF, sums, RANK)
    assert error < 0.95 * sums.missed(output_map(plain, core.down_DF))
    assert error == pytest.approx(missed([one], [fold(core, wrapper)]) * one.energy, rel=1e-4)
    for _ in range(20):
        noise = [
            0.03 * torch.randn(part.shape, generator=generator) for part in (plain.out_left_DR, plain.out_right_RD)
        ]
        changed = replace(
            wrapper, out_left_DR=wrapper.out_left_DR + noise[0], out_right_RD=wrapper.out_right_RD + noise[1]
        )
        assert sums.missed(output_map(changed, core.down_DF)) > error
