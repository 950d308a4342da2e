"""The safe-ratio curve: nested sets, interpolation by hand, a picture with the same bytes every time."""

import xml.etree.ElementTree as ElementTree
from functools import partial
from math import inf
from types import SimpleNamespace

import pytest
import torch

from moe_edge.contracts.errors import InfeasibleError
from moe_edge.formulas.selection import CRITERIA, keep_prefix, rank
from moe_edge.planning.allocation import header_plan
from moe_edge.planning.curve import (
    Curve,
    CurvePoint,
    check_safe,
    curve_counts,
    curve_svg,
    limit_nats,
    measure_curve,
)
from moe_edge.planning.scoring import WholeScorer
from tests.planning.plan_helpers import config, headers
from tests.tiny import tiny_ids, tiny_model

POINTS = {16: 0.0, 14: 0.07, 12: 0.19, 8: 1.17}
CURVE = Curve("frequency", 16, 8, 1024, tuple(CurvePoint(n, kl, (0.9 * kl, 1.1 * kl)) for n, kl in POINTS.items()))


def test_the_counts_are_the_shares_that_leave_room_for_top_k():
    assert curve_counts(16, 4) == [16, 14, 12, 10, 8, 6]
    assert curve_counts(16, 8, chosen=[9]) == [16, 14, 12, 10, 9, 8]
    assert curve_counts(128, 8) == [128, 112, 96, 80, 64, 48] and curve_counts(6, 2) == [6, 5, 4, 3, 2]


def test_between_the_points_it_is_linear_and_outside_unknown():
    assert CURVE.kl_nats(14) == 0.07 and CURVE.kl_nats(15) == pytest.approx(0.035)
    assert CURVE.kl_nats(10) == pytest.approx(0.68) and CURVE.kl_nats(7) == inf


def test_the_fewest_safe_experts_are_those_before_the_first_break():
    assert CURVE.fewest_within(2.0) == 8 and CURVE.fewest_within(0.5) == 12 and CURVE.fewest_within(-1) is None
    bumpy = Curve("ean", 4, 1, 8, (CurvePoint(4, 0.0, None), CurvePoint(3, 0.9, None), CurvePoint(2, 0.1, None)))
    assert bumpy.fewest_within(0.5) == 4, "a lucky point behind a break does not count"
    data, interval = CURVE.to_json(0.5), CURVE.points[1].kl_nats_ci95
    expected = {"experts": 14, "share": 0.875, "kl_nats": 0.07, "kl_nats_ci95": interval}
    assert data["fewest_safe_experts"] == 12 and data["points"][1] == expected


def test_a_curve_is_the_masked_kl_of_every_count():
    model, ids = tiny_model("qwen3_moe"), tiny_ids(rows=3)
    kept = lambda count: dict.fromkeys(range(2), list(range(count)))  # noqa: E731
    scorer = WholeScorer(model)
    measured = measure_curve(scorer.masked_kl, "first", kept, curve_counts(6, 2), ids, experts_total=6, top_k=2)
    assert [point.experts for point in measured.points] == [6, 5, 4, 3, 2] and measured.n_tokens == ids.numel()
    assert measured.points[0].kl_nats < 1e-9 < measured.points[1].kl_nats
    again = scorer.masked_kl({"x": kept(3)}, ids)["x"]
    assert measured.kl_nats(3) == again.kl_nats and measured.points[3].kl_nats_ci95 == again.ci95
    lower = partial(scorer.masked_kl, top_k=1)
    fewer = measure_curve(lower, "first", kept, [6], ids, experts_total=6, top_k=1)
    assert fewer.points[0].kl_nats > 1e-3, "a lower top-k alone costs something"


def test_the_picture_is_deterministic_and_shows_the_choice():
    picture = curve_svg(CURVE, 2.0, chosen=10)
    assert picture == curve_svg(CURVE, 2.0, chosen=10) != curve_svg(CURVE, 2.0, chosen=12)
    texts = "".join(ElementTree.fromstring(picture).itertext())
    for words in ("chosen: 10", "experts kept per layer, of 16 (top-8)", "chosen by frequency", "limit: 2 nats"):
        assert words in texts, words
    assert "limit" not in "".join(ElementTree.fromstring(curve_svg(CURVE, 50.0)).itertext())


@pytest.mark.parametrize("name", CRITERIA)
def test_the_curves_sets_are_nested_under_every_criterion(name):
    """What stays at 50 % also stays at 75 %, also with groups of experts."""
    generator = torch.Generator().manual_seed(0)
    sums_LE = torch.rand(3, 16, generator=generator, dtype=torch.float64) + 0.1
    hsic_LEE = torch.rand(3, 16, 16, generator=generator, dtype=torch.float64)
    hsic_LEE = hsic_LEE @ hsic_LEE.mT
    sums = ("gate_sum_LE", "norm_sum_LE", "norm_sq_sum_LE", "gated_norm_sum_LE", "loo_sq_sum_LE")
    fields = (*sums, "weight_mean_abs_LE", "weight_rms_LE")
    columns = {field: sums_LE.roll(place, dims=1) for place, field in enumerate(fields)}
    counts = {"counts_LE": (sums_LE * 100).long(), "loo_counts_LE": (sums_LE * 50).long(), "tokens": 1000}
    stats = SimpleNamespace(**columns, **counts, hsic_LEE=hsic_LEE, gated_hsic_LEE=hsic_LEE)
    order_LE = rank(name, stats, seed=3)
    for groups in (1, 2):
        sets = [keep_prefix(order_LE, count, groups) for count in curve_counts(16, 4)]
        for larger, smaller in zip(sets, sets[1:], strict=False):
            assert all(set(smaller[layer]) < set(larger[layer]) for layer in range(3))


FALLING_POINTS = {8: 0.0, 6: 0.4, 5: 1.2, 4: 3.0}
FALLING = Curve("x", 8, 2, 64, tuple(CurvePoint(n, kl, None) for n, kl in FALLING_POINTS.items()))


@pytest.mark.parametrize(("nats", "words"), [(0.5, None), (1.3, "Doubtful"), (1.99, "Doubtful")])
def test_a_default_build_passes_and_a_doubtful_one_is_told(tmp_path, nats, words):
    """.5 nats is what both example models lose at 62.5 %; 1.2 to 1.4 is what one of them loses at 50 %."""
    answer = header_plan(headers(tmp_path), config())
    notes = check_safe(answer, nats, FALLING, config().plan, "x 1.0")
    assert (notes == []) if words is None else notes[0].startswith(words)


def test_an_unsafe_ratio_stops_with_the_nearest_safe_count_unless_forced(tmp_path):
    answer = header_plan(headers(tmp_path), config("plan.experts=4"))
    with pytest.raises(InfeasibleError, match="loses 3.000 nats") as caught:
        check_safe(answer, 3.0, FALLING, config().plan, "x 3.000")
    assert caught.value.exit_code == 3 and "--set plan.experts=5" in caught.value.next_command
    assert "5: 1.200" in str(caught.value) and "the safe limit" in str(caught.value)
    forced = check_safe(answer, 3.0, FALLING, config("plan.force=true").plan, "x 3.000")
    assert forced[0].startswith("Forced")
    strict = config("plan.max_kl_nats=0.5").plan
    assert limit_nats(strict) == 0.5
    with pytest.raises(InfeasibleError, match="the limit is 0.5"):
        check_safe(answer, 0.6, FALLING, strict, "x 0.6")
