"""The measured decision: quantize harder against dropping experts, with the curve and the sensitivity given."""

import pytest

from moe_edge.contracts.quantization import CODEBOOK_LEVELS
from moe_edge.planning.allocation import HARDER_ORDER, header_plan
from moe_edge.planning.bits import Sensitivity, prior_sensitivity
from moe_edge.planning.curve import Curve, CurvePoint
from moe_edge.planning.decision import bits_are_free, decide, decide_by_priors, quantization_of, settle
from moe_edge.planning.estimate import Packing, file_bytes
from tests.planning.plan_helpers import NO_SHARE, config, headers, with_codebooks


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return headers(tmp_path_factory.mktemp("teacher"), layers=3)


def curve(per_expert):
    return Curve("x", 8, 2, 64, tuple(CurvePoint(n, per_expert * (8 - n), None) for n in range(8, 1, -1)))


def solve(teacher, *settings):
    return header_plan(teacher, config(NO_SHARE, *settings))


def budget(teacher, experts, recipe, more=0):
    return f"target.budget.weights={file_bytes(solve(teacher).model, experts, Packing('gguf', recipe)) + more}"


@pytest.fixture(scope="module")
def tight(teacher):
    """Just too small for every expert in the target's type."""
    return solve(teacher, budget(teacher, 8, "Q4_K_M", -1))


def test_where_experts_matter_the_bits_give_way(tight):
    settled, quantization = decide(tight, curve(per_expert=5.0))
    assert settled.keeps_all and settled.choice.fits and settled.choice.packing.mix
    assert settled.rival.experts < 8 and "experts" in settled.rival_lost and "against" in settled.rival_lost
    label = settled.choice.packing.label
    assert label.endswith("-mix") and quantization.source == "prior"
    assert quantization.nats[label] == pytest.approx(
        prior_sensitivity(settled.model).of_packing(settled.choice.packing, 3)
    )
    assert quantization.nats["Q8_0"] < quantization.nats[label]
    assert any("Bits by least KL per byte (from priors)" in note for note in settled.notes)


def test_where_bits_matter_experts_give_way(tight):
    table = {"Q2_K": 5.0, "Q3_K": 4.0, "Q4_K": 3.0, "Q5_K": 2.0, "Q6_K": 1.0, "Q8_0": 0.5}
    cells = [(name, third) for name in ("attention", "expert_gate_up", "expert_down") for third in range(3)]
    known = Sensitivity(dict.fromkeys(cells, table), "measured", 77)
    settled, quantization = decide(tight, curve(per_expert=0.01), known)
    assert settled.choice.experts < 8 and settled.rival.experts == 8 and settled.choice.fits
    assert quantization.source == "measured" and any("measured on 77 tokens" in note for note in settled.notes)
    assert any("Decoding still reads" in note for note in settled.notes)


def test_codebook_types_are_chosen_where_they_are_measured_and_said_to_be_slow(tight):
    for known, slow in ((prior_sensitivity(tight.model), False), (with_codebooks(tight.model), True)):
        settled, quantization = decide(tight, curve(0.5), known)
        assert bool(set(CODEBOOK_LEVELS) & set(dict(settled.choice.packing.mix).values())) == slow
        assert any("A CPU decodes" in note for note in settled.notes) == slow
        assert settled.choice.packing.label in quantization.nats


def test_only_counts_of_the_curve_are_considered(tight):
    short = Curve("x", 8, 2, 64, (CurvePoint(8, 9.0, None), CurvePoint(7, 8.0, None)))
    assert decide(tight, short)[0].choice.experts in (7, 8)


def test_where_all_experts_fit_at_no_type_it_says_so(teacher):
    answer = solve(teacher, budget(teacher, 3, "Q2_K"))
    settled, _ = decide(answer, curve(per_expert=5.0))
    assert settled.rival is None and settled.choice.experts < 8
    assert any("fits at no number of bits" in note for note in settled.notes)


def test_bits_are_free_only_under_an_absolute_budget_that_binds(teacher, tight):
    binding = (NO_SHARE, budget(teacher, 8, "Q4_K_M", -1))
    assert bits_are_free(tight, config(*binding))
    for setting in ("plan.bits=Q3_K_M", "plan.experts=6", "export.gguf.types=[Q3_K_M]", "export.formats=[onnx]"):
        settings = config(*binding, setting)
        assert not bits_are_free(header_plan(teacher, settings), settings), setting
    roomy = config(NO_SHARE, "target.budget.weights=1GiB")
    assert not bits_are_free(header_plan(teacher, roomy), roomy), "the preferred type holds everything"
    share = config("target.budget.experts=62.5%", budget(teacher, 8, "Q4_K_M", -1))
    assert not bits_are_free(header_plan(teacher, share), share), "a relative budget keeps its recipe"


@pytest.mark.parametrize("experts", [8, 6])
def test_a_number_of_experts_leaves_the_bits_free_where_its_preferred_type_does_not_fit(teacher, experts):
    least = file_bytes(solve(teacher).model, experts, Packing("gguf", "Q2_K"))
    settings = config(NO_SHARE, f"plan.experts={experts}", f"target.budget.weights={least - 1}")
    answer = header_plan(teacher, settings)
    assert bits_are_free(answer, settings) and answer.choice.packing.mix, "fewer bits than any recipe has"
    decided, cost = decide(answer, curve(per_expert=0.1))
    assert decided.choice.experts == experts and decided.choice.packing.label in cost.nats
    assert not any("fits at no number of bits" in note for note in decided.notes)
    assert (decided.rival is None) == (experts == 8) and (experts == 8 or "plan.experts=6" in decided.rival_lost)


def test_a_dry_run_decides_by_priors_and_keeps_the_answer_where_there_are_none(teacher, tight):
    binding = config(NO_SHARE, budget(teacher, 8, "Q4_K_M", -1))
    guessed = decide_by_priors(tight, binding)
    assert guessed.keeps_all and guessed.choice.packing.mix and "expected KL" in guessed.rival_lost
    share = header_plan(teacher, config())
    named = decide_by_priors(share, config())
    assert named.choice is share.choice and named.notes == share.notes and "nats" in named.rival_lost
    lower = solve(teacher, "plan.top_k=1")
    assert decide_by_priors(lower, config(NO_SHARE, "plan.top_k=1")) is lower


def test_without_a_measurement_recipes_have_their_own_prior(teacher):
    found = quantization_of(solve(teacher))
    assert found.source == "prior" and 0 < found.nats["Q8_0"] <= found.nats["Q4_K_M"]
    assert quantization_of(solve(teacher, "export.formats=[onnx]")).nats == {}


def test_quantizing_harder_wins_where_it_is_expected_to_lose_less(teacher):
    """Pruning 8 -> 7 at Q4_K_M against all 8 at a smaller type within the same bytes."""
    answer = solve(teacher, budget(teacher, 8, "Q4_K_M", -1))
    assert answer.rival.experts == 8 and answer.rival.fits and answer.rival.packing.name in HARDER_ORDER
    swapped = settle(answer, masked_kl_nats=2.0)
    assert swapped.keeps_all and swapped.rival is answer.choice and "7 of 8 experts" in swapped.competitor
    stays = settle(answer, masked_kl_nats=0.001)
    assert stays.choice is answer.choice and "loses more" in stays.competitor


def test_a_forbidden_rival_is_named_with_its_numbers(teacher):
    settled = settle(header_plan(teacher, config()), masked_kl_nats=2.0)
    assert settled.choice.experts == 5 and "not allowed" in settled.competitor and "nats" in settled.competitor
    assert any("would lose less" in note for note in settled.notes)


def test_a_type_that_was_not_asked_for_cannot_win(teacher):
    limit = budget(teacher, 8, "Q4_K_M", -1)
    settled = settle(solve(teacher, limit, "plan.bits=Q4_K_M"), masked_kl_nats=2.0)
    assert settled.choice.packing.name == "Q4_K_M" and "not allowed, plan.bits=Q4_K_M" in settled.competitor
    listed = settle(solve(teacher, limit, "export.gguf.types=[Q4_K_M, Q3_K_M]"), masked_kl_nats=2.0)
    assert listed.keeps_all and listed.quantization != "Q4_K_M"
