"""Routers: gates and losses against transformers and slow float64 loops; drawn experts have the right chances and weights."""

from itertools import permutations
from math import prod, sqrt

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_edge.formulas.routers import (
    are_probabilities,
    augmented_experts,
    every_expert,
    gate_logprobs,
    importance_variation,
    load_balance,
    router_z,
    routing_kl,
    spread_weights,
)

TOKENS, EXPERTS, TOP_K = 37, 6, 2


def logits(seed: int = 0, experts: int = EXPERTS) -> Tensor:
    return 2 * torch.randn(TOKENS, experts, generator=torch.manual_seed(seed))


def test_a_sigmoid_gate_is_the_sigmoids_over_their_sum() -> None:
    sigmoid_TE = logits().double().sigmoid()
    expected_TE = sigmoid_TE / sigmoid_TE.sum(dim=1, keepdim=True)
    torch.testing.assert_close(gate_logprobs(logits(), sigmoid=True).exp(), expected_TE.float())
    torch.testing.assert_close(gate_logprobs(logits()).exp(), logits().double().softmax(dim=1).float())


def test_half_precision_logits_are_judged_in_float32() -> None:
    assert gate_logprobs(logits().bfloat16()).dtype == torch.float32
    assert router_z(logits().half()).dtype == torch.float32


def test_load_balance_is_that_of_transformers_for_one_layer() -> None:
    gate_TE = logits().softmax(dim=1)
    value = load_balance(gate_TE, gate_TE.topk(TOP_K).indices)
    torch.testing.assert_close(value, load_balancing_loss_func((logits(),), EXPERTS, TOP_K))


def test_load_balance_without_padding_is_that_of_transformers_with_a_mask() -> None:
    padded_TE, mask_1T = logits()[:20], (torch.arange(20) < 13)[None].long()
    gate_TE = padded_TE[:13].softmax(dim=1)
    value = load_balance(gate_TE, gate_TE.topk(TOP_K).indices)
    torch.testing.assert_close(value, load_balancing_loss_func((padded_TE,), EXPERTS, TOP_K, mask_1T))


def test_load_balance_is_k_at_an_even_load_and_e_at_a_collapse() -> None:
    even_TE = torch.full((EXPERTS, EXPERTS), 1 / EXPERTS)
    turns_TK = torch.stack([(torch.arange(EXPERTS) + shift) % EXPERTS for shift in range(TOP_K)], dim=1)
    assert load_balance(even_TE, turns_TK).item() == pytest.approx(TOP_K)
    certain_TE = torch.zeros(TOKENS, EXPERTS)
    certain_TE[:, 0] = 1
    assert load_balance(certain_TE, torch.zeros(TOKENS, 1, dtype=torch.long)).item() == pytest.approx(EXPERTS)


def test_with_all_experts_active_load_balance_has_no_gradient_and_importance_has() -> None:
    slopes = {}
    everything_TE = torch.arange(EXPERTS).expand(TOKENS, EXPERTS)
    for name in ("balance", "importance"):
        raw_TE = logits().double().requires_grad_(True)
        gate_TE = gate_logprobs(raw_TE).exp()
        value = load_balance(gate_TE, everything_TE) if name == "balance" else importance_variation(gate_TE)
        (slope_TE,) = torch.autograd.grad(value, raw_TE)
        slopes[name] = float(slope_TE.abs().max())
    assert slopes["balance"] < 1e-15 < 1e-5 < slopes["importance"]


def test_importance_variation_against_a_loop() -> None:
    gate_TE = logits().double().softmax(dim=1)
    sums = [sum(float(gate_TE[t, e]) for t in range(TOKENS)) for e in range(EXPERTS)]
    mean = sum(sums) / EXPERTS
    variance = sum((value - mean) ** 2 for value in sums) / EXPERTS
    assert importance_variation(gate_TE).item() == pytest.approx(variance / mean**2, rel=1e-12)


def test_importance_variation_runs_from_zero_to_e_minus_one() -> None:
    assert importance_variation(torch.full((TOKENS, EXPERTS), 1 / EXPERTS)).item() == pytest.approx(0, abs=1e-10)
    certain_TE = torch.zeros(TOKENS, EXPERTS)
    certain_TE[:, 3] = 1
    assert importance_variation(certain_TE).item() == pytest.approx(EXPERTS - 1)


def test_router_z_against_a_loop() -> None:
    rows = [sum(torch.exp(z).item() for z in row_E) for row_E in logits().double()]
    expected = sum(torch.log(torch.tensor(row, dtype=torch.float64)).item() ** 2 for row in rows) / TOKENS
    assert router_z(logits().double()).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_routing_kl_against_a_float64_loop(sigmoid: bool) -> None:
    kept = [0, 2, 3, 5]
    teacher_TE, student_Te = logits(), logits(1, len(kept))
    scores = (lambda z: z.double().sigmoid()) if sigmoid else (lambda z: z.double().exp())
    total = 0.0
    for token in range(TOKENS):
        p = scores(teacher_TE[token])[kept]
        q = scores(student_Te[token])
        p, q = p / p.sum(), q / q.sum()
        total += sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
    assert routing_kl(teacher_TE, student_Te, kept, sigmoid).item() == pytest.approx(total / TOKENS, rel=1e-5)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_routing_kl_is_zero_where_the_student_chooses_as_the_teacher(sigmoid: bool) -> None:
    kept = [1, 2, 4]
    shift = 0.0 if sigmoid else 0.7  # a softmax does not see a shift of all logits
    value = routing_kl(logits(), logits()[:, kept] + shift, kept, sigmoid)
    assert abs(value.item()) < 1e-6


@pytest.mark.parametrize("sigmoid", [False, True])
def test_gradients_are_those_of_the_values(sigmoid: bool) -> None:
    student_TE = logits(1).double()[:5].requires_grad_(True)
    teacher_TE = logits().double()[:5].requires_grad_(True)
    kept = list(range(EXPERTS))
    index_TK = student_TE.topk(TOP_K).indices
    assert torch.autograd.gradcheck(lambda z: routing_kl(teacher_TE, z, kept, sigmoid), student_TE)
    assert torch.autograd.gradcheck(lambda z: importance_variation(gate_logprobs(z, sigmoid).exp()), student_TE)
    assert torch.autograd.gradcheck(lambda z: load_balance(gate_logprobs(z, sigmoid).exp(), index_TK), student_TE)
    assert torch.autograd.gradcheck(router_z, student_TE)
    routing_kl(teacher_TE, student_TE, kept, sigmoid).backward()
    assert teacher_TE.grad is None


def test_probabilities_are_told_from_logits() -> None:
    assert not are_probabilities(logits()) and not are_probabilities(logits(), sigmoid=True)
    assert not are_probabilities(torch.zeros(3, EXPERTS)) and not are_probabilities(torch.zeros(3, EXPERTS), True)
    assert are_probabilities(logits().softmax(dim=1).bfloat16())
    assert are_probabilities(logits().sigmoid(), sigmoid=True)


DRAWN_TOKENS, DRAWN_EXPERTS = 4000, 4


def uneven_gate(tokens: int = DRAWN_TOKENS) -> Tensor:
    return torch.tensor([0.55, 0.25, 0.15, 0.05]).expand(tokens, DRAWN_EXPERTS)


def draw(
    probability: float, count: int = DRAWN_EXPERTS - 1, seed: int = 0, tokens: int = DRAWN_TOKENS
) -> tuple[Tensor, Tensor]:
    return augmented_experts(
        uneven_gate(tokens), uneven_gate(tokens), count, probability, torch.Generator().manual_seed(seed)
    )


def test_lambda_zero_takes_the_top_and_lambda_one_always_samples() -> None:
    index_TN, sampled_T = draw(0.0)
    assert not sampled_T.any() and torch.equal(index_TN, torch.tensor([0, 1, 2]).expand(DRAWN_TOKENS, 3))
    assert draw(1.0)[1].all()


def test_the_top_goes_by_the_preference_and_the_draw_by_the_gate() -> None:
    preference_TE = uneven_gate().flip(1)
    index_TN, _ = augmented_experts(uneven_gate(), preference_TE, 1, 0.0, torch.Generator())
    assert (index_TN == 3).all()
    drawn_TN, _ = augmented_experts(uneven_gate(), preference_TE, 1, 1.0, torch.Generator().manual_seed(0))
    assert (drawn_TN == 0).float().mean() == pytest.approx(0.55, abs=5 * sqrt(0.55 * 0.45 / DRAWN_TOKENS))


def test_experts_are_distinct_and_the_rate_is_lambda() -> None:
    index_TN, sampled_T = draw(0.05)
    assert all(len(set(row)) == 3 for row in index_TN.tolist())
    assert sampled_T.float().mean() == pytest.approx(0.05, abs=5 * sqrt(0.05 * 0.95 / DRAWN_TOKENS))
    missing_T = DRAWN_EXPERTS * (DRAWN_EXPERTS - 1) // 2 - index_TN.sum(dim=1)
    assert (missing_T[~sampled_T] == 3).all() and (missing_T[sampled_T] != 3).any()


def test_who_is_left_out_has_the_chance_of_drawing_without_replacement() -> None:
    chances = [0.55, 0.25, 0.15, 0.05]
    left_out = [0.0] * DRAWN_EXPERTS
    for order in permutations(range(DRAWN_EXPERTS)):  # p1 p2/(1-p1) p3/(1-p1-p2): the last one is left out
        left = [1 - sum(chances[e] for e in order[:place]) for place in range(3)]
        left_out[order[-1]] += prod(chances[e] / left[place] for place, e in enumerate(order[:3]))
    index_TN, _ = draw(1.0)
    missing_T = DRAWN_EXPERTS * (DRAWN_EXPERTS - 1) // 2 - index_TN.sum(dim=1)
    for expert, expected in enumerate(left_out):
        margin = 5 * sqrt(expected * (1 - expected) / DRAWN_TOKENS)
        assert (missing_T == expert).float().mean().item() == pytest.approx(expected, abs=margin)


def test_a_seed_gives_the_same_experts_again() -> None:
    assert torch.equal(draw(0.5)[0], draw(0.5)[0]) and not torch.equal(draw(0.5)[0], draw(0.5, seed=1)[0])


def test_a_gate_that_underflows_can_still_be_drawn() -> None:
    certain_TE = torch.tensor([1.0, 0.0, 0.0]).expand(50, 3)
    index_TN, _ = augmented_experts(certain_TE, certain_TE, 2, 1.0, torch.Generator().manual_seed(0))
    assert (index_TN == 0).any(dim=1).all() and {1, 2} <= set(index_TN.flatten().tolist())


def test_weights_are_the_gate_over_the_chosen_scaled_to_the_total() -> None:
    logprob_TE = torch.randn(9, DRAWN_EXPERTS, generator=torch.manual_seed(0)).log_softmax(dim=1)
    index_TN, total_T = torch.tensor([3, 1]).expand(9, 2), torch.linspace(0.2, 1.8, 9)
    chosen_TN = logprob_TE.double().exp()[:, [3, 1]]
    expected_TN = chosen_TN / chosen_TN.sum(dim=1, keepdim=True) * total_T[:, None]
    torch.testing.assert_close(spread_weights(logprob_TE, index_TN, total_T), expected_TN.float())
    everything_TE = spread_weights(logprob_TE, every_expert(logprob_TE), torch.ones(9))
    torch.testing.assert_close(everything_TE, logprob_TE.exp())
