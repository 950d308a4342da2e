"""Sensitivities, mixes and the noise rule: by hand, and consistent with the exporter's types."""

import numpy as np
import pytest

from moe_edge.contracts.quantization import BIT_CLASSES, GGML_TYPES, LEVELS, mix_key, mixed_type, pinned_type
from moe_edge.planning.bits import NOISE, Sensitivity, along_noise, mix_of, mix_types, prior_sensitivity, recipe_types
from moe_edge.planning.estimate import Packing
from moe_edge.runtimes.ggml_quants import round_trip
from tests.planning.plan_helpers import model


def test_noise_is_what_ggml_does_to_normal_rows():
    every_row = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    importance = np.random.default_rng(1).random(512).astype(np.float32) + 0.5
    assert set(NOISE) == set(GGML_TYPES)
    for kind, expected in NOISE.items():
        rows = every_row[:8] if kind.startswith("IQ") else every_row  # codebooks are searched for seconds
        error = float(((round_trip(kind, rows, importance) - rows) ** 2).mean())
        assert error == pytest.approx(expected, rel=0.2, abs=1e-6), kind


def test_between_points_a_power_law_and_beyond_them_the_square_root():
    known = {0.01: 0.02, 0.0001: 0.0002}  # slope 1
    assert along_noise(known, 0.001) == pytest.approx(0.002)
    assert along_noise(known, 0.04) == pytest.approx(0.04) and along_noise(known, 0.000001) == pytest.approx(0.00002)
    assert along_noise(known, 0.0) == 0 and along_noise({0.01: 0.0}, 0.01) == 0


def test_a_sensitivity_adds_up_its_cells():
    table = {"Q4_K": 0.1, "Q8_0": 0.01}
    known = Sensitivity({("attention", 0): table, ("attention", 1): table, ("expert_down", 1): table}, "measured")
    assert known.of(("attention", 0), "Q4_K") == 0.1 and known.of(("shared", 0), "Q4_K") == 0
    assert known.of(("attention", 0), "F16") == 0 and 0.01 < known.of(("attention", 0), "Q6_K") < 0.1
    assert known.of(("attention", 0), "Q4_0") > 0.1
    packing = Packing("gguf", "Q8_0", mix=(("attention@0-0", "Q4_K"),))
    assert known.of_packing(packing, layers=2) == pytest.approx(0.1 + 0.01 + 0.01)


def test_priors_grow_with_noise_and_see_the_fallbacks(tmp_path):
    prior = prior_sensitivity(model(tmp_path, layers=4))
    sums = [sum(prior.of(cell, kind) for cell in prior.nats) for kind in LEVELS]
    assert sums == sorted(sums, reverse=True) and prior.source == "prior" and sums[-1] > 0
    odd = prior_sensitivity(model(tmp_path / "odd", hidden=96, width=96))
    assert odd.of(("expert_down", 0), "Q2_K") == odd.of(("expert_down", 0), "Q3_K"), "both are stored as IQ4_NL"


def test_recipes_and_mixes_name_every_cell():
    types = recipe_types("Q4_K_M", layers=5)
    assert types["expert_down", 2] == "Q5_K" and types["embedding_head", 0] == "Q6_K" and len(types) == 4 * 3 + 1
    types |= {("attention", 0): "Q8_0", ("expert_gate_up", 1): "Q2_K", ("expert_gate_up", 2): "Q2_K"}
    mix = mix_of(types, layers=5)
    assert dict(mix)["expert_gate_up@2-4"] == "Q2_K" and dict(mix)["expert_gate_up@0-1"] == "Q4_K"
    assert dict(mix)["shared"] == "Q6_K" and mix_types(mix, layers=5) == types


@pytest.mark.parametrize("layers", [1, 2, 3, 7])
def test_a_mix_means_the_same_to_the_planner_and_to_the_exporter(layers):
    rng = np.random.default_rng(layers)
    types = {cell: str(rng.choice(LEVELS)) for cell in recipe_types("Q8_0", layers)}
    mix = dict(mix_of(types, layers))
    for layer in range(layers):
        third = [place for place, found in enumerate(thirds(layers)) if layer in found][0]
        for name, members in BIT_CLASSES.items():
            if name != "embedding_head":
                assert all(mixed_type(mix, member, layer) == types[name, third] for member in members)
    assert mixed_type(mix, "head", None) == types["embedding_head", 0] and mixed_type(mix, "router", 0) is None


def thirds(layers):
    from moe_edge.contracts.quantization import layer_thirds

    found = layer_thirds(layers)
    assert [layer for third in found for layer in third] == list(range(layers)) and len(found) == min(layers, 3)
    return found


def test_a_mix_replaces_the_recipe_and_rows_still_fall_back():
    mix = {"expert_down@0-1": "Q3_K", "expert_down": "Q2_K", "shared": "Q8_0"}
    assert pinned_type("Q4_K_M", "expert_down", 512, 1, mix) == "Q3_K"
    assert pinned_type("Q4_K_M", "expert_down", 512, 2, mix) == "Q2_K"
    assert pinned_type("Q4_K_M", "expert_down", 96, 2, mix) == "IQ4_NL"
    assert (
        pinned_type("Q4_K_M", "expert_up", 512, 2, mix) == "Q4_K"
        and pinned_type("Q4_K_M", "router", 512, 2, mix) == "F32"
    )
    assert pinned_type("Q4_K_M", "dense_up", 512, 0, mix) == "Q8_0"


@pytest.mark.parametrize("text", ["experts", "expert_down@", "expert_down@3", "expert_down@4-2", "expert_down@a-b"])
def test_wrong_keys_of_a_mix_are_refused(text):
    with pytest.raises(ValueError):
        mix_key(text)
