"""Narrower experts: silent neurons go at no cost, strong ones stay, the configuration follows, the checkpoint reloads."""

from types import SimpleNamespace

import pytest
import torch

from moe_edge.compression.layers import Material
from moe_edge.compression.surgery import apply_plan
from moe_edge.compression.width import narrow_layer
from moe_edge.contracts.errors import ConfigError
from moe_edge.models.views import expert_activations, expert_outputs, moe_layers
from moe_edge.models.weights import expert_width, read_expert, replace_experts
from tests.compression.action_helpers import KEPT, ROWS, block_inputs, kl_nats, log_probabilities, material, plan_of
from tests.tiny import FAMILY_NAMES, tiny_model

ALL = {0: list(range(6)), 1: list(range(6))}
WIDE = {"width": 64}


@torch.no_grad()
def with_silent_neurons(family: str):
    """A model in which every second neuron of every expert answers nothing, in an order that differs between experts."""
    model = tiny_model(family, **WIDE)
    generator = torch.Generator().manual_seed(3)
    for view in moe_layers(model):
        networks = []
        for expert in range(view.count):
            weights = read_expert(view, expert)
            silent = torch.randperm(64, generator=generator)[:32]
            weights.up_FD[silent] = 0.0
            networks.append(weights)
        replace_experts(view, networks)
    return model


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_silent_neurons_go_at_no_cost(family):
    model = with_silent_neurons(family)
    before, given = log_probabilities(model), material(model)
    applied = apply_plan(model, plan_of(ALL, experts_kept=6, expert_width=32), given)
    assert torch.allclose(log_probabilities(model), before, atol=1e-4)
    assert kl_nats(before, log_probabilities(model)) < 1e-9
    assert [expert_width(view) for view in moe_layers(model)] == [32, 32]
    config = model.config.to_dict()
    assert config["moe_intermediate_size" if family.startswith("qwen") else "intermediate_size"] == 32
    assert [record["neuron_energy_kept"] for record in applied.layers] == pytest.approx([1.0, 1.0], abs=1e-12)


def test_the_strongest_neurons_stay_in_their_order():
    model = tiny_model("qwen3_moe", **WIDE)
    view, hidden_TD = moe_layers(model)[0], block_inputs(model)[0]
    old, energy = read_expert(view, 2), expert_activations(view, hidden_TD, 2).square().sum(dim=0)
    strength = energy * old.down_DF.square().sum(dim=0)
    neurons_EW, shares = narrow_layer(view, material(model).statistics.imatrix["expert_down"][0], 32)
    kept = neurons_EW[2]
    assert kept.tolist() == sorted(strength.topk(32).indices.tolist())
    assert shares[2] == pytest.approx(float(strength[kept].sum() / strength.sum()), rel=1e-4)
    assert torch.equal(read_expert(view, 2).gate_FD, old.gate_FD[kept])


def test_narrowing_beats_a_random_choice_of_neurons():
    model, at_random = (tiny_model("olmoe", **WIDE) for _ in range(2))
    teacher, given = log_probabilities(model), material(model)
    plan = plan_of(ALL, experts_kept=6, expert_width=32)
    apply_plan(model, plan, given)
    noise = dict(given.statistics.imatrix, expert_down=torch.rand(2, 6, 64, generator=torch.Generator().manual_seed(0)))
    apply_plan(at_random, plan, Material(SimpleNamespace(imatrix=noise), ROWS))
    assert kl_nats(teacher, log_probabilities(model)) < kl_nats(teacher, log_probabilities(at_random))


@pytest.mark.parametrize("sequential", [False, True])
def test_compensation_lowers_every_layers_error(sequential):
    plain, refitted = (tiny_model("qwen2_moe", **WIDE) for _ in range(2))
    teacher, given = log_probabilities(plain), material(plain)
    plan = plan_of(KEPT, expert_width=32)
    apply_plan(plain, plan, given)
    applied = apply_plan(refitted, plan_of(KEPT, expert_width=32, compensate=True, sequential=sequential), given)
    assert all(record["missed"] < record["missed_after_dropping"] and record["ridge"] for record in applied.layers)
    assert kl_nats(teacher, log_probabilities(refitted)) < kl_nats(teacher, log_probabilities(plain))


def test_the_quantizer_is_told_what_the_remaining_columns_read():
    plans = [plan_of(KEPT, expert_width=32), plan_of(KEPT, expert_width=32, compensate=True)]
    energies = []
    for plan in plans:
        model = tiny_model("mixtral", **WIDE)
        given = material(model)
        applied = apply_plan(model, plan, given)
        energies.append(applied.down_energy)
    picked, measured = (energy[0] for energy in energies)
    assert picked.shape == measured.shape == (4, 32)
    view, hidden_TD = moe_layers(model)[0], block_inputs(model)[0]
    everywhere = torch.stack([expert_activations(view, hidden_TD, expert).square().mean(dim=0) for expert in range(4)])
    assert torch.allclose(picked.float(), everywhere, rtol=1e-3)  # these statistics saw every token in every expert
    assert torch.corrcoef(torch.stack([picked.flatten(), measured.flatten()]))[0, 1] > 0.7  # routed tokens only


def test_width_composes_with_fewer_experts_and_a_lower_top_k():
    model = with_silent_neurons("qwen3_moe")
    reference = with_silent_neurons("qwen3_moe")
    apply_plan(reference, plan_of(KEPT, top_k=1))
    apply_plan(model, plan_of(KEPT, top_k=1, expert_width=32), material(model))
    assert torch.allclose(log_probabilities(model), log_probabilities(reference), atol=1e-4)
    views = moe_layers(model)
    assert (views[0].count, views[0].top_k, expert_width(views[0])) == (4, 1, 32)
    with torch.no_grad():
        assert expert_outputs(views[0], torch.randn(3, 64)).isfinite().all()


@pytest.mark.parametrize(
    ("width", "given", "word"), [(96, True, "cannot be widened to 96"), (32, False, "needs a profile")]
)
def test_an_impossible_width_is_refused(width, given, word):
    model = tiny_model("qwen3_moe", **WIDE)
    with pytest.raises(ConfigError, match=word):
        apply_plan(model, plan_of(KEPT, expert_width=width), material(model) if given else Material())
    assert expert_width(moe_layers(model)[0]) == 64
