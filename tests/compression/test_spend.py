"""The greedy allocation: meets every budget, spends it well, and never loses to a recipe of the same size."""

import itertools

import pytest

from moe_edge.compression.allocation import header_plan
from moe_edge.compression.bits import Sensitivity, prior_sensitivity
from moe_edge.compression.estimate import Packing, file_bytes
from moe_edge.compression.spend import _costs, _greedy, allocate
from moe_edge.contracts.quantization import LEVELS
from tests.compression.plan_helpers import NO_SHARE, config, headers


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return headers(tmp_path_factory.mktemp("teacher"), layers=3)


def space(teacher, *settings):
    return header_plan(teacher, config(NO_SHARE, *settings)).space


def test_the_file_fits_and_more_bytes_never_cost_quality(teacher):
    known = prior_sensitivity(space(teacher).model)
    sizes = [
        file_bytes(space(teacher).model, 8, Packing("gguf", name)) for name in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q8_0")
    ]
    found = []
    for size in sizes:
        option, nats = allocate(space(teacher, f"target.budget.weights={size}"), 8, known)
        assert option.fits and option.estimate.file_bytes <= size
        assert option.estimate.file_bytes == file_bytes(space(teacher).model, 8, option.packing)
        assert nats == pytest.approx(known.of_packing(option.packing, 3))
        found.append(nats)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("recipe", ["Q3_K_M", "Q4_K_M", "Q5_K_M"])
def test_it_beats_the_recipe_of_the_same_bytes(teacher, recipe):
    at = space(teacher)
    known, size = prior_sensitivity(at.model), file_bytes(at.model, 8, Packing("gguf", recipe))
    _, nats = allocate(space(teacher, f"target.budget.weights={size}"), 8, known)
    assert nats <= known.of_packing(Packing("gguf", recipe), 3) + 1e-9


def test_bits_go_where_they_matter(teacher):
    """Only the first third of the down projections is sensitive."""
    table = {kind: 1.0 / (1 + place) for place, kind in enumerate(LEVELS)}
    known = Sensitivity({("expert_down", 0): table}, "measured", 8)
    tight = file_bytes(space(teacher).model, 8, Packing("gguf", "Q3_K_M"))
    option, nats = allocate(space(teacher, f"target.budget.weights={tight}"), 8, known)
    mix = dict(option.packing.mix)
    assert mix["expert_down@0-0"] == "Q8_0" and mix["expert_down@1-2"] == "Q2_K" and mix["attention"] == "Q2_K"
    assert nats == pytest.approx(table["Q8_0"]) and option.packing.name == "Q2_K"


def test_nothing_is_allocated_where_nothing_fits(teacher):
    at = space(teacher)
    starved = at.__class__(**(at.__dict__ | {"limits": at.limits.__class__(1000, None, None)}))
    assert allocate(starved, 8, prior_sensitivity(at.model)) is None


def test_decode_speed_bounds_the_bits_that_are_read(teacher):
    slow = "target.hardware.bandwidth_gb_per_s={value: 0.02, source: a test, confidence: assumed}"
    at = space(teacher, slow)
    known = prior_sensitivity(at.model)
    free = allocate(at, 8, known)[0].estimate.decode_tokens_per_s
    option, _ = allocate(space(teacher, slow, f"target.budget.decode_tokens_per_s={1.2 * free}"), 8, known)
    assert option.estimate.decode_tokens_per_s >= 1.2 * free


def test_the_walk_is_close_to_exhaustive_search(teacher):
    """Three cells, every assignment tried: greedy walk and exchanges come within two per cent of the best."""
    at = space(teacher)
    costs = _costs(at, 8)
    cells = [("expert_down", 0), ("expert_gate_up", 1), ("attention", 2)]
    costs.file = {cell: costs.file[cell] for cell in cells}
    costs.read = {cell: costs.read[cell] for cell in cells}
    known = prior_sensitivity(at.model)
    least, most = (sum(costs.file[cell][kind] for cell in cells) for kind in (LEVELS[0], LEVELS[-1]))
    for share in (0.1, 0.3, 0.5, 0.8):
        cap = least + share * (most - least)
        types = _greedy(costs, known, cap, float("inf"))
        assert sum(costs.file[cell][types[cell]] for cell in cells) <= cap
        ours = sum(known.of(cell, types[cell]) for cell in cells)
        best = min(
            sum(known.of(cell, kind) for cell, kind in zip(cells, kinds, strict=True))
            for kinds in itertools.product(LEVELS, repeat=3)
            if sum(costs.file[cell][kind] for cell, kind in zip(cells, kinds, strict=True)) <= cap
        )
        assert best <= ours <= best * 1.02
