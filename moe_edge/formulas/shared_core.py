"""A shared core for all experts of a layer: expert_e(x) ~ (s_e I + P_e Q_e) core((I + U_e V_e) x), fitted zero-shot.

One gated FFN (`shared_core`) does the work of all experts; a low-rank `input_wrapper` I + U_e V_e and a low-rank
`output_wrapper` s_e I + P_e Q_e per expert bend it towards each of them. Both wrappers are linear, so an expert can be
folded into ordinary weights exactly (models/shared_core.py).

Fitted by alternating least squares on calibration tokens, each part with the others fixed:
- output wrapper: reduced-rank regression of what the scaled core misses (closed form);
- input wrapper: reduced-rank regression in the space of pre-activations, towards the expert's own gate and up;
- core gate and up: ridge regression of all experts' pre-activations at once;
- core down: conjugate gradients on the sum over experts, a quadratic in it.
The second and third are least squares of a surrogate, because the activation function lies between them and the output.
So every step is kept only if the reconstruction error of the outputs falls: it never rises.

For a given input wrapper and core, that error is a quadratic form in whatever maps activations to outputs. So the tokens are
reduced to sums once (`Moments`), and output wrappers, the core's down projection and errors are computed from these.

Shape suffixes: E experts, N tokens of an expert, D model, F width of core and experts, G = 2F gate and up rows, M = min(G, D)
singular directions, R rank.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from moe_edge.formulas.ffn import Ffn, neuron_rows, weighted_mean
from moe_edge.formulas.least_squares import low_rank_map, ridge_map
from moe_edge.formulas.merging import neuron_matching

RIDGE = 1e-2
STEPS = (1.0, 0.5, 0.25)  # lengths of a step that is tried; the first that lowers the error is kept
ROUNDS = 3
CONJUGATE_STEPS = 8
DAMPING = 0.1  # of the largest singular value: directions that the core hardly reads are hardly used to reach a target

Activation = Callable[[Tensor, Tensor], Tensor]  # gate_NF, up_NF -> act_NF


@dataclass(frozen=True)
class ExpertData:
    """What one expert does on its tokens; its neurons are in the core's order."""

    weights: Ffn
    hidden_ND: Tensor
    gate_N: Tensor  # the weight that the router gives the output
    output_ND: Tensor  # raw, before the gate

    @property
    def energy(self) -> float:
        """sum of (gate x ||output||)^2."""
        return float((self.gate_N.double().unsqueeze(1) * self.output_ND.double()).square().sum())


@dataclass(frozen=True)
class ExpertWrapper:
    """The two wrappers of one expert."""

    in_left_DR: Tensor
    in_right_RD: Tensor
    out_scale: float
    out_left_DR: Tensor
    out_right_RD: Tensor

    def wrap_input(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND + (hidden_ND @ self.in_right_RD.T) @ self.in_left_DR.T


def identity(hidden: int, rank: int, like: Tensor) -> ExpertWrapper:
    """Wrappers that leave input and output as they are; one factor is not zero, so that training can move the other."""
    tall, flat = like.new_zeros(hidden, rank), torch.eye(rank, hidden).to(like)
    return ExpertWrapper(tall, flat, 1.0, tall, flat)


def balanced(wrapper: ExpertWrapper) -> ExpertWrapper:
    """The same wrappers with both factors of every direction equally long, so that training moves them alike."""
    in_left_DR, in_right_RD = _balanced(wrapper.in_left_DR, wrapper.in_right_RD)
    out_left_DR, out_right_RD = _balanced(wrapper.out_left_DR, wrapper.out_right_RD)
    return ExpertWrapper(in_left_DR, in_right_RD, wrapper.out_scale, out_left_DR, out_right_RD)


def _balanced(left_DR: Tensor, right_RD: Tensor) -> tuple[Tensor, Tensor]:
    left_R, right_R = left_DR.norm(dim=0), right_RD.norm(dim=1)
    factor_R = torch.where((left_R > 0) & (right_R > 0), torch.sqrt(right_R / left_R), 1.0)
    return left_DR * factor_R, right_RD / factor_R.unsqueeze(1)


@dataclass
class SharedCore:
    """A core, its wrappers, and how much of the experts' gated output it misses (share of the energy, per step)."""

    core: Ffn
    wrappers: list[ExpertWrapper]
    history: list[float] = field(default_factory=list)


def silu_gate(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate_NF) * up_NF


def core_activations(core: Ffn, hidden_ND: Tensor, activation: Activation) -> Tensor:
    return activation(hidden_ND @ core.gate_FD.T, hidden_ND @ core.up_FD.T)


def fold(core: Ffn, wrapper: ExpertWrapper) -> Ffn:
    """The ordinary expert that core and wrappers amount to, exactly: both wrappers are linear."""
    gate_FD, up_FD = (
        weight_FD + (weight_FD @ wrapper.in_left_DR) @ wrapper.in_right_RD for weight_FD in (core.gate_FD, core.up_FD)
    )
    down_DF = wrapper.out_scale * core.down_DF + wrapper.out_left_DR @ (wrapper.out_right_RD @ core.down_DF)
    return Ffn(gate_FD, up_FD, down_DF)


def fit_shared_core(
    experts: Sequence[ExpertData],
    sample_TD: Tensor,
    rank: int,
    activation: Activation = silu_gate,
    rounds: int = ROUNDS,
) -> SharedCore:
    """Zero-shot initialisation by alternating least squares; deterministic.

    Args:
        experts: their tokens and outputs; the order of neurons is free.
        sample_TD: some hidden states of the layer, on which the neurons of two experts are compared.
        rank: R of both wrappers.

    Returns:
        `history[0]` is the error of the best starting core with fitted output wrappers.
    """
    data = align(experts, sample_TD.float(), activation)
    energies = [one.energy for one in data]
    strongest = max(range(len(data)), key=lambda index: (energies[index], -index))
    starts = [weighted_mean([one.weights for one in data], energies), data[strongest].weights]
    fits = [AlternatingFit(data, core, rank, activation) for core in starts]
    best = min(fits, key=lambda fit: fit.total)
    for _ in range(rounds):
        best.step_inputs()
        best.step_gate_up()
        best.step_down()
    return SharedCore(best.core, [balanced(wrapper) for wrapper in best.wrappers], best.history)


def align(experts: Sequence[ExpertData], sample_TD: Tensor, activation: Activation) -> list[ExpertData]:
    """The experts in float32 with their neurons in the order of the one with the most energy."""
    data = [_in_float32(one) for one in experts]
    reference = max(data, key=lambda one: one.energy).weights
    act_TF, rows_FW = core_activations(reference, sample_TD, activation), neuron_rows(reference)
    aligned = []
    for one in data:
        own_TF = core_activations(one.weights, sample_TD, activation)
        order_F, _ = neuron_matching(act_TF, own_TF, rows_FW, neuron_rows(one.weights))
        aligned.append(replace(one, weights=one.weights.select(order_F)))
    return aligned


def _in_float32(one: ExpertData) -> ExpertData:
    weights = Ffn(one.weights.gate_FD.float(), one.weights.up_FD.float(), one.weights.down_DF.float())
    return ExpertData(weights, one.hidden_ND.float(), one.gate_N.float(), one.output_ND.float())


class Moments(NamedTuple):
    """Sums over one expert's tokens, weighted by the squared gate, float64."""

    gram_FF: Tensor  # of the core's activations
    products_FD: Tensor  # of activations and the expert's own outputs
    energy: float  # of the expert's own outputs

    def missed(self, map_DF: Tensor) -> float:
        """sum of ||gate (output - map act)||^2."""
        explained = 2 * (map_DF * self.products_FD.T).sum() - ((map_DF @ self.gram_FF) * map_DF).sum()
        return max(self.energy - float(explained), 0.0)


def moments(one: ExpertData, wrapper: ExpertWrapper, core: Ffn, activation: Activation) -> Moments:
    """Of an expert's tokens under an input wrapper and a core."""
    gate_N1 = one.gate_N.unsqueeze(1)
    act_NF = (gate_N1 * core_activations(core, wrapper.wrap_input(one.hidden_ND), activation)).double()
    target_ND = (gate_N1 * one.output_ND).double()
    return Moments(act_NF.T @ act_NF, act_NF.T @ target_ND, float(target_ND.square().sum()))


def output_map(wrapper: ExpertWrapper, down_DF: Tensor) -> Tensor:
    """What turns activations into wrapped outputs, [D, F] float64."""
    down_DF = down_DF.double()
    return wrapper.out_scale * down_DF + _low_rank(wrapper, down_DF)


def _low_rank(wrapper: ExpertWrapper, down_DF: Tensor) -> Tensor:
    return wrapper.out_left_DR.double() @ (wrapper.out_right_RD.double() @ down_DF)


def best_output(wrapper: ExpertWrapper, down_DF: Tensor, sums: Moments, rank: int) -> tuple[ExpertWrapper, float]:
    """The output wrapper for a given input wrapper and core, and the error; the old one if it is better."""
    down_DF, old_error = down_DF.double(), sums.missed(output_map(wrapper, down_DF))
    reach_DF = down_DF @ sums.gram_FF
    own = float((reach_DF * down_DF).sum())  # energy of the core's outputs
    if own <= 0:
        return wrapper, old_error
    wanted = float((down_DF * sums.products_FD.T).sum())
    basis_DB, factor_BF = torch.linalg.qr(down_DF)  # the outputs lie in there; nothing is lost, and much less is solved
    rest_FD = sums.products_FD - wanted / own * reach_DF.T
    gram_BB, products_BD = factor_BF @ sums.gram_FF @ factor_BF.T, factor_BF @ rest_FD
    left_DR, right_RB = low_rank_map(gram_BB, products_BD, rank, RIDGE * own / len(down_DF))
    fitted = replace(wrapper, out_left_DR=left_DR.float(), out_right_RD=(right_RB @ basis_DB.T).float())
    taken = float((reach_DF * _low_rank(fitted, down_DF)).sum())
    fitted = replace(fitted, out_scale=(wanted - taken) / own)
    error = sums.missed(output_map(fitted, down_DF))
    return (fitted, error) if error < old_error else (wrapper, old_error)


class AlternatingFit:
    """The state of one alternating fit."""

    def __init__(self, data: Sequence[ExpertData], core: Ffn, rank: int, activation: Activation) -> None:
        self.data, self.core, self.rank, self.activation = list(data), core, rank, activation
        self.energy = sum(one.energy for one in data)
        self.wrappers = [identity(core.gate_FD.shape[1], rank, core.gate_FD) for _ in data]
        fits = self._fits(core)
        self.wrappers, self.errors = [wrapper for wrapper, _ in fits], [error for _, error in fits]
        self.history = [self.total]

    @property
    def total(self) -> float:
        """Missed share of the experts' gated output energy."""
        return sum(self.errors) / self.energy if self.energy > 0 else 0.0

    def _sums(self, index: int, wrapper: ExpertWrapper, core: Ffn) -> Moments:
        return moments(self.data[index], wrapper, core, self.activation)

    def _fits(self, core: Ffn) -> list[tuple[ExpertWrapper, float]]:
        """The best output wrappers for a core."""
        return [
            best_output(wrapper, core.down_DF, self._sums(index, wrapper, core), self.rank)
            for index, wrapper in enumerate(self.wrappers)
        ]

    def step_inputs(self) -> None:
        """New input wrappers (and the output wrappers that go with them), expert by expert."""
        core_GD = torch.cat([self.core.gate_FD, self.core.up_FD]).double()
        u_GM, s_M, v_MD = torch.linalg.svd(core_GD, full_matrices=False)
        inverse_M = s_M / (s_M.square() + (DAMPING * s_M[0]).square()).clamp(min=torch.finfo(torch.float64).tiny)
        for index, one in enumerate(self.data):
            if not len(one.hidden_ND):
                continue
            own_GD = torch.cat([one.weights.gate_FD, one.weights.up_FD]).double()
            gated_ND = (one.gate_N.unsqueeze(1) * one.hidden_ND).double()
            gram_DD = gated_ND.T @ gated_ND
            missed_DM = gram_DD @ (own_GD - core_GD).T @ u_GM
            strength = RIDGE * float(gram_DD.trace()) / len(gram_DD)
            left_MR, right_RD = low_rank_map(gram_DD, missed_DM, self.rank, strength)
            self._try_inputs(index, v_MD.T @ (inverse_M.unsqueeze(1) * left_MR), right_RD)
        self.history.append(self.total)

    def _try_inputs(self, index: int, left_DR: Tensor, right_RD: Tensor) -> None:
        """Keep the first length of the step that lowers the expert's error."""
        for step in STEPS:
            tried = replace(self.wrappers[index], in_left_DR=(step * left_DR).float(), in_right_RD=right_RD.float())
            wrapper, error = best_output(tried, self.core.down_DF, self._sums(index, tried, self.core), self.rank)
            if error < self.errors[index]:
                self.wrappers[index], self.errors[index] = wrapper, error
                break

    def step_gate_up(self) -> None:
        """A core whose pre-activations are closest to all experts' own, given the input wrappers."""
        core_GD = torch.cat([self.core.gate_FD, self.core.up_FD])
        inputs, missed = [], []
        for one, wrapper in zip(self.data, self.wrappers, strict=True):
            own_GD = torch.cat([one.weights.gate_FD, one.weights.up_FD])
            wrapped_ND = wrapper.wrap_input(one.hidden_ND)
            gate_N1 = one.gate_N.unsqueeze(1)
            inputs.append(gate_N1 * wrapped_ND)
            missed.append(gate_N1 * (one.hidden_ND @ own_GD.T - wrapped_ND @ core_GD.T))
        change_GD = ridge_map(torch.cat(inputs), torch.cat(missed), RIDGE).float()
        gate_FD, up_FD = change_GD.chunk(2)
        self._try_cores(
            self.core._replace(gate_FD=self.core.gate_FD + step * gate_FD, up_FD=self.core.up_FD + step * up_FD)
            for step in STEPS
        )

    def step_down(self) -> None:
        """Conjugate gradients on sum_e ||gate (f_e - O_e W a_e)||^2 in W, the core's down projection."""
        sums = [self._sums(index, wrapper, self.core) for index, wrapper in enumerate(self.wrappers)]
        down_DF = self.core.down_DF.double()

        def product(change_DF: Tensor) -> Tensor:
            total_DF = torch.zeros_like(change_DF)
            for wrapper, each in zip(self.wrappers, sums, strict=True):
                total_DF += transposed_output(wrapper, output_map(wrapper, change_DF) @ each.gram_FF)
            return total_DF

        gradient_DF = -product(down_DF)
        for wrapper, each in zip(self.wrappers, sums, strict=True):
            gradient_DF += transposed_output(wrapper, each.products_FD.T)
        change_DF = conjugate_gradients(product, gradient_DF, CONJUGATE_STEPS)
        self._try_cores([self.core._replace(down_DF=(down_DF + change_DF).float())])

    def _try_cores(self, cores: Iterable[Ffn]) -> None:
        """Keep the first core that lowers the total error, with its refitted output wrappers."""
        for core in cores:
            fits = self._fits(core)
            if sum(error for _, error in fits) < sum(self.errors):
                self.core = core
                self.wrappers, self.errors = [wrapper for wrapper, _ in fits], [error for _, error in fits]
                break
        self.history.append(self.total)


def transposed_output(wrapper: ExpertWrapper, image_DF: Tensor) -> Tensor:
    """(s I + P Q)^T applied to every column, float64."""
    pulled_RF = wrapper.out_left_DR.double().T @ image_DF
    return wrapper.out_scale * image_DF + wrapper.out_right_RD.double().T @ pulled_RF


def conjugate_gradients(product: Callable[[Tensor], Tensor], right_DF: Tensor, steps: int) -> Tensor:
    """An approximate solution X of product(X) = right for a symmetric positive semidefinite product.

    Every step lowers the quadratic X product(X) / 2 - X right (Hestenes & Stiefel 1952).
    """
    solution_DF = torch.zeros_like(right_DF)
    residual_DF, direction_DF = right_DF.clone(), right_DF.clone()
    square = residual_DF.square().sum()
    for _ in range(steps):
        image_DF = product(direction_DF)
        curvature = (direction_DF * image_DF).sum()
        if square <= 0 or curvature <= 0:
            break
        length = square / curvature
        solution_DF += length * direction_DF
        residual_DF -= length * image_DF
        new_square = residual_DF.square().sum()
        direction_DF = residual_DF + new_square / square * direction_DF
        square = new_square
    return solution_DF
