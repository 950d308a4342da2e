"""The measured part of the plan: curve files, free bits, and the refusal of unsafe ratios."""

import json
from functools import partial

import pytest
import torch

from moe_edge.contracts.errors import InfeasibleError
from moe_edge.models.loading import load_model
from moe_edge.planning import measured_budget as plan_budget
from moe_edge.planning.allocation import Packing, header_plan
from moe_edge.planning.curve import UNSAFE_KL_NATS, Curve, CurvePoint
from moe_edge.planning.masking import masked_kl
from moe_edge.planning.measured_budget import (
    check_safe,
    codebooks_suit,
    first_rows,
    limit_nats,
    measure_budget,
    write_curve,
)
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.planning.plan_helpers import NO_SHARE, config
from tests.tiny import tiny_checkpoint, tiny_ids

SMALL = ("plan.curve_tokens=24", "plan.sensitivity_tokens=24")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return tiny_checkpoint(folder, "qwen3_moe", experts=8, hidden=256, width=256, layers=2)


def first(count):
    return dict.fromkeys(range(2), list(range(count)))


def measure(teacher, *settings):
    resolved = config(*SMALL, *settings)
    feasible = header_plan(inspect_checkpoint(teacher), resolved)
    model = load_model(teacher)
    score = partial(masked_kl, model)
    return measure_budget(feasible, resolved, score, model, tiny_ids(vocab=300), None, "first", first), feasible


def binding(teacher):
    space = header_plan(inspect_checkpoint(teacher), config(NO_SHARE)).space
    return f"target.budget.weights={space.option(8, Packing('gguf', 'Q4_K_M')).estimate.file_bytes - 1}"


def test_a_relative_budget_gets_a_curve_and_keeps_its_recipe(teacher, monkeypatch):
    monkeypatch.setattr(plan_budget, "measure_sensitivity", lambda *_args: pytest.fail("bits are not free"))
    measured, feasible = measure(teacher)
    assert measured.feasible is feasible and not measured.free and measured.quantization.source == "prior"
    assert [point.experts for point in measured.curve.points] == [8, 7, 6, 5, 4, 3]
    assert measured.curve.points[0].kl_nats < 1e-9 < measured.curve.points[-1].kl_nats
    assert measured.curve.n_tokens == 24 and measured.curve.criterion == "first"


def test_codebooks_are_not_for_a_cpu_of_which_a_speed_is_demanded_nor_for_students_with_other_columns():
    speed = "target.budget.decode_tokens_per_s=5"
    assert codebooks_suit(config()) and codebooks_suit(config("plan.action=merge"))
    assert not codebooks_suit(config(speed)) and codebooks_suit(config(speed, "target.runtime.gpu_layers=-1"))
    assert not codebooks_suit(config("plan.action=dense")) and not codebooks_suit(config("plan.action=shared-core"))


def test_free_bits_are_decided_with_measured_numbers(teacher):
    measured, _ = measure(teacher, NO_SHARE, binding(teacher))
    assert measured.free and measured.quantization.source == "measured" and measured.quantization.tokens == 24
    choice = measured.feasible.choice
    assert choice.fits and choice.packing.mix and measured.quantization.nats[choice.packing.label] > 0


def test_without_sensitivity_tokens_priors_decide(teacher, monkeypatch):
    monkeypatch.setattr(plan_budget, "measure_sensitivity", lambda *_args: pytest.fail("it was switched off"))
    measured, _ = measure(teacher, NO_SHARE, binding(teacher), "plan.sensitivity_tokens=0")
    assert measured.free and measured.quantization.source == "prior"


def test_the_curve_is_written_the_same_every_time(teacher, tmp_path):
    measured, _ = measure(teacher)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_curve(tmp_path / name, measured.curve, config().plan, chosen=5)
    for name in ("curve.json", "curve.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    data = json.loads((tmp_path / "a/curve.json").read_text())
    assert data["limit_nats"] == UNSAFE_KL_NATS and len(data["points"]) == 6 and data["fewest_safe_experts"] == 3


CURVE = Curve("x", 8, 2, 64, tuple(CurvePoint(n, kl, None) for n, kl in ((8, 0.0), (6, 0.4), (5, 1.2), (4, 3.0))))


@pytest.mark.parametrize(("nats", "words"), [(0.5, None), (1.3, "Doubtful"), (1.99, "Doubtful")])
def test_a_default_build_passes_and_a_doubtful_one_is_told(teacher, nats, words):
    """.5 nats is what both example models lose at 62.5 %; 1.2 to 1.4 is what one of them loses at 50 %."""
    feasible = header_plan(inspect_checkpoint(teacher), config())
    notes = check_safe(feasible, nats, CURVE, config().plan, "x 1.0")
    assert (notes == []) if words is None else notes[0].startswith(words)


def test_an_unsafe_ratio_stops_with_the_nearest_safe_count_unless_forced(teacher):
    feasible = header_plan(inspect_checkpoint(teacher), config("plan.experts=4"))
    with pytest.raises(InfeasibleError, match="loses 3.000 nats") as caught:
        check_safe(feasible, 3.0, CURVE, config().plan, "x 3.000")
    assert caught.value.exit_code == 3 and "--set plan.experts=5" in caught.value.next_command
    assert "5: 1.200" in str(caught.value) and "the safe limit" in str(caught.value)
    forced = check_safe(feasible, 3.0, CURVE, config("plan.force=true").plan, "x 3.000")
    assert forced[0].startswith("Forced")
    strict = config("plan.max_kl_nats=0.5").plan
    assert limit_nats(strict) == 0.5
    with pytest.raises(InfeasibleError, match="the limit is 0.5"):
        check_safe(feasible, 0.6, CURVE, strict, "x 0.6")


def test_rows_are_whole_and_never_none():
    ids = torch.zeros(4, 16)
    assert len(first_rows(ids, 33)) == 2 and len(first_rows(ids, 3)) == 1 and len(first_rows(ids, 1000)) == 4
