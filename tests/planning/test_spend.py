"""The choice of bits: meets every budget, is the best of all, and never loses to a recipe of the same size."""

import itertools
from math import inf

import numpy as np
import pytest

from moe_edge.contracts.quantization import CODEBOOK_CLASSES, CODEBOOK_LEVELS, LEVELS
from moe_edge.planning.allocation import header_plan
from moe_edge.planning.bits import Sensitivity, mix_of, prior_sensitivity, recipe_types
from moe_edge.planning.estimate import Packing, file_bytes
from moe_edge.planning.spend import CLEAR_MARGIN, allocate, cell_bytes, cheapest
from tests.planning.plan_helpers import NO_SHARE, config, headers, with_codebooks


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


def test_the_choice_is_the_best_of_all(teacher):
    """Three cells, every assignment tried, with and without a cap on what a token reads."""
    at = space(teacher)
    costs, known = cell_bytes(at, 8), with_codebooks(at.model)
    cells = [("expert_down", 0), ("expert_gate_up", 1), ("attention", 2)]
    file, read = ({cell: table[cell] for cell in cells} for table in (costs.file, costs.read))
    every = [dict(zip(cells, kinds, strict=True)) for kinds in itertools.product(*(known.levels(c) for c in cells))]

    def total(table, types):
        return sum(table[cell][kind] for cell, kind in types.items())

    def nats(types):
        return sum(known.of(cell, kind) for cell, kind in types.items())

    sizes = sorted(total(file, types) for types in every)
    for share, tight in itertools.product((0.0, 0.1, 0.3, 0.5, 0.8, 1.0), (inf, 0.6)):
        cap = sizes[0] + share * (sizes[-1] - sizes[0]) + 100
        reads = sorted(total(read, types) for types in every)
        read_cap = reads[0] + tight * (reads[-1] - reads[0])
        types = cheapest(file, read, known, cap, read_cap)
        fitting = [other for other in every if total(file, other) <= cap and total(read, other) <= read_cap]
        assert types in fitting and nats(types) == pytest.approx(min(map(nats, fitting)), rel=1e-6)
    assert cheapest(file, read, known, sizes[0] - 1, inf) is None and cheapest(file, read, known, -1.0, inf) is None


def test_more_bytes_never_cost_predicted_kl(teacher):
    at = space(teacher)
    costs, rng = cell_bytes(at, 8), np.random.default_rng(0)
    for _ in range(3):  # what was measured need not fall from level to level
        nats = {cell: dict(zip(LEVELS, rng.random(len(LEVELS)), strict=True)) for cell in costs.file}
        known = Sensitivity(nats, "measured", 8)
        least, most = (sum(table[kind] for table in costs.file.values()) for kind in (LEVELS[0], LEVELS[-1]))
        found = []
        for cap in np.linspace(1.001 * least, most, 12):
            types = cheapest(costs.file, costs.read, known, cap, inf)
            assert sum(costs.file[cell][kind] for cell, kind in types.items()) <= cap
            found.append(sum(known.of(cell, kind) for cell, kind in types.items()))
        assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(found))


@pytest.mark.parametrize("recipe", ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_S"])
def test_a_recipe_is_always_a_candidate(teacher, recipe):
    """At exactly its bytes, where no other level costs anything less, the recipe itself is the choice and not a mix."""
    at = space(teacher)
    types = recipe_types(recipe, 3)
    levels = with_codebooks(at.model).nats
    nats = {cell: {kind: 1.0 + (kind != types[cell]) for kind in table} for cell, table in levels.items()}
    size = file_bytes(at.model, 8, Packing("gguf", recipe))
    option, found = allocate(space(teacher, f"target.budget.weights={size}"), 8, Sensitivity(nats, "measured", 8))
    assert option.packing == Packing("gguf", recipe) and found == len(nats)
    option, _ = allocate(space(teacher, f"target.budget.weights={size - 1}"), 8, Sensitivity(nats, "measured", 8))
    assert option.packing.mix and option.estimate.file_bytes < size


def test_a_mix_replaces_a_recipe_only_by_a_clear_margin(teacher):
    """All Q8_0 fits; Q6_K in one cell is measured to be better by a little, then by a lot."""
    at = space(teacher)
    size = file_bytes(at.model, 8, Packing("gguf", "Q8_0"))
    for gain, is_mix in ((0.9 * CLEAR_MARGIN, False), (1.1 * CLEAR_MARGIN, True)):
        nats = {cell: dict.fromkeys(LEVELS[:-1], 2.0) | {"Q8_0": 1.0} for cell in prior_sensitivity(at.model).nats}
        nats["attention", 1]["Q6_K"] = 1.0 - gain * len(nats)
        option, found = allocate(space(teacher, f"target.budget.weights={size}"), 8, Sensitivity(nats, "measured", 8))
        assert bool(option.packing.mix) == is_mix
        assert found == pytest.approx(len(nats) - (gain * len(nats) if is_mix else 0))


def test_codebooks_fill_the_gap_at_two_bits_and_only_for_experts(teacher):
    at = space(teacher)
    size = file_bytes(at.model, 8, Packing("gguf", "Q2_K"))
    tight = space(teacher, f"target.budget.weights={size}")
    (plain, more), (option, less) = (
        allocate(tight, 8, known) for known in (prior_sensitivity(at.model), with_codebooks(at.model))
    )
    assert less < more and not set(CODEBOOK_LEVELS) & set(dict(plain.packing.mix).values())
    chosen = {key.partition("@")[0] for key, kind in option.packing.mix if kind in CODEBOOK_LEVELS}
    assert chosen and chosen <= set(CODEBOOK_CLASSES)


def test_rows_that_no_codebook_divides_cost_what_they_fall_back_to(tmp_path):
    odd = header_plan(headers(tmp_path, layers=3, width=96), config(NO_SHARE)).space
    costs = cell_bytes(odd, 8)
    assert costs.file["expert_down", 0]["IQ2_S"] == costs.file["expert_down", 0]["Q2_K"], "both are stored as IQ4_NL"
    assert costs.file["expert_gate_up", 0]["IQ2_S"] < costs.file["expert_gate_up", 0]["Q2_K"]
    recipe = Packing("gguf", "Q8_0")
    total = sum(costs.file[cell]["Q8_0"] for cell in costs.file)
    others = file_bytes(odd.model, 8, recipe) - total
    mixed = {cell: "IQ3_XXS" if cell[0] in CODEBOOK_CLASSES else "Q5_K" for cell in costs.file}
    packing = Packing("gguf", "Q8_0", mix=mix_of(mixed, 3))
    assert file_bytes(odd.model, 8, packing) == others + sum(costs.file[cell][kind] for cell, kind in mixed.items())
