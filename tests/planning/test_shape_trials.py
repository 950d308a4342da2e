"""Top-k and width under auto, measured: every shape is weighed, the least KL wins, and the plan says by how much."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from moe_edge.compression.width import Narrowing
from moe_edge.contracts.artifacts import ProfileFolder
from moe_edge.contracts.errors import ConfigError, InfeasibleError
from moe_edge.contracts.plan import Plan, TriedShape
from moe_edge.models.loading import load_model
from moe_edge.models.views import moe_layers
from moe_edge.models.weights import read_expert, write_expert
from moe_edge.planning import curve
from moe_edge.planning.allocation import header_plan
from moe_edge.planning.estimate import Packing
from moe_edge.planning.scoring import WholeScorer
from moe_edge.planning.shape_trials import compared_nats
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics
from tests.planning.plan_helpers import NO_SHARE, config
from tests.stages.inputs import EXPERTS, LAYERS, plain_statistics, run_plan, write_profile
from tests.tiny import tiny_checkpoint

WIDTH = 128
BOTH = ("plan.top_k=auto", "plan.expert_width=auto", "plan.criterion=frequency", "plan.curve_tokens=32")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher"), "qwen3_moe", experts=EXPERTS, layers=LAYERS, width=WIDTH)


@pytest.fixture(scope="module")
def half_silent(teacher, tmp_path_factory) -> Path:
    """The same teacher, the upper half of whose neurons puts out nothing."""
    folder = tmp_path_factory.mktemp("silent") / "teacher"
    model = load_model(teacher)
    for view in moe_layers(model):
        for expert in range(view.count):
            weights = read_expert(view, expert)
            weights.down_DF[:, WIDTH // 2 :] = 0
            write_expert(view, expert, weights)
    model.save_pretrained(folder)
    for path in teacher.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def with_neurons(folder: Path) -> ProfileFolder:
    """A profile that has seen every neuron equally."""
    imatrix = {"expert_down": torch.ones(LAYERS, EXPERTS, WIDTH), "expert_count": torch.ones(LAYERS, EXPERTS)}
    return write_profile(folder, replace(plain_statistics(), imatrix=imatrix))


def test_the_least_kl_of_all_shapes_wins(teacher, tmp_path):
    _, plan = run_plan(teacher, tmp_path, *BOTH, profile=with_neurons(tmp_path / "profile"))
    assert {(s.top_k, s.expert_width) for s in plan.shapes} == {(k, w) for k in (2, 1) for w in (None, 96, 64)}
    compared = [compared_nats(shape, refits=True) for shape in plan.shapes]
    assert compared == sorted(compared) and (plan.top_k, plan.expert_width) == (
        plan.shapes[0].top_k,
        plan.shapes[0].expert_width,
    )
    assert all(s.kl_nats == pytest.approx(s.refitted_kl_nats + s.quantization_kl_nats) for s in plan.shapes)
    assert {s.expert_width: s.experts_kept for s in plan.shapes} == {None: 5, 96: 6, 64: 8}, "the share holds for all"


def test_each_shape_is_measured_by_masking_experts_and_neurons(teacher, tmp_path):
    profile = with_neurons(tmp_path / "profile")
    _, plan = run_plan(teacher, tmp_path, *BOTH, profile=profile)
    rows = torch.from_numpy(TokenRows.load(profile.rows).ids_NS).long()[-4:-2]
    sums = Statistics.load(profile.statistics).imatrix["expert_down"]
    scorer = WholeScorer(load_model(teacher))
    for shape in plan.shapes:
        kept = dict.fromkeys(range(LAYERS), list(range(shape.experts_kept)))
        neurons = None if shape.expert_width is None else Narrowing(sums, shape.expert_width).mask
        expected = scorer.masked_kl({"x": kept}, rows, shape.top_k, neurons)["x"].kl_nats
        assert shape.masked_kl_nats == pytest.approx(expected, rel=1e-4)


def test_narrower_experts_win_where_half_of_the_neurons_are_silent(half_silent, tmp_path):
    _, plan = run_plan(half_silent, tmp_path, *BOTH, profile=with_neurons(tmp_path / "profile"))
    assert (plan.experts_kept, plan.top_k, plan.expert_width) == (EXPERTS, 2, 64) and not plan.prunes
    assert plan.predicted_kl_nats < 1e-6 < plan.shapes[-1].masked_kl_nats and plan.alters
    assert plan.estimate.routed_expert_share_kept == 0.5


def test_a_width_that_was_asked_for_is_predicted_too(half_silent, tmp_path):
    profile = with_neurons(tmp_path / "profile")
    ask = partial(run_plan, half_silent, profile=profile)
    _, none = ask(tmp_path / "a", "plan.experts=1.0", "plan.expert_width=64")
    assert none.predicted_kl_nats < 1e-6 and none.expert_width == 64 and none.shapes == []
    _, some = ask(tmp_path / "b", "plan.experts=1.0", "plan.expert_width=32")
    assert some.predicted_kl_nats > 1e-3


def test_without_activations_a_width_is_refused(teacher, tmp_path):
    with pytest.raises(ConfigError, match="profile with activations"):
        run_plan(teacher, tmp_path, "plan.expert_width=64")


def test_a_top_k_that_costs_too_much_stops_like_an_unsafe_ratio(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(curve, "UNSAFE_KL_NATS", 1e-6)
    with pytest.raises(InfeasibleError, match="the safe limit") as caught:
        run_plan(teacher, tmp_path / "a", "plan.experts=1.0", "plan.top_k=1", "plan.expert_width=keep")
    assert caught.value.exit_code == 3 and "plan.top_k=keep" in caught.value.next_command
    forced = ("plan.experts=1.0", "plan.top_k=1", "plan.expert_width=keep", "plan.force=true")
    _, plan = run_plan(teacher, tmp_path / "b", *forced)
    assert any(note.startswith("Forced") and "(top-1)" in note for note in plan.notes)


def test_a_speed_budget_under_auto_is_met_by_measured_shapes(teacher, tmp_path):
    fast = ("target.hardware.bandwidth_gb_per_s={value: 10.0, source: a test, confidence: assumed}",)
    whole = ("plan.experts=1.0", "plan.top_k=1", "plan.expert_width=keep")
    base = run_plan(teacher, tmp_path / "a", *fast, *whole, profile=write_profile(tmp_path / "p"))[1]
    least = f"target.budget.decode_tokens_per_s={base.estimate.decode_tokens_per_s - 1}"
    settings = (*fast, least, "plan.experts=1.0", "plan.bits=Q4_K_M", "target.runtime.kv_cache=f16", *BOTH)
    _, plan = run_plan(teacher, tmp_path / "b", *settings, profile=with_neurons(tmp_path / "profile"))
    assert plan.estimate.decode_tokens_per_s >= base.estimate.decode_tokens_per_s - 1
    assert all(shape.decode_tokens_per_s >= base.estimate.decode_tokens_per_s - 1 for shape in plan.shapes)
    assert (2, None) not in {(shape.top_k, shape.expert_width) for shape in plan.shapes}


def test_free_bits_and_shapes_are_decided_together(teacher, tmp_path):
    """A file budget just below all experts in the target's type: every shape gets its own count and bits."""
    space = header_plan(inspect_checkpoint(teacher), config(NO_SHARE)).space
    limit = space.option(EXPERTS, Packing("gguf", "Q4_K_M")).estimate.file_bytes - 1
    settings = (*BOTH, NO_SHARE, f"target.budget.weights={limit}", "plan.sensitivity_tokens=32")
    _, plan = run_plan(teacher, tmp_path, *settings, profile=with_neurons(tmp_path / "profile"))
    assert plan.shapes[0].kl_nats == min(shape.kl_nats for shape in plan.shapes)
    assert all(shape.file_bytes <= limit for shape in plan.shapes) and plan.estimate.file_bytes <= limit
    assert any(shape.quantization.endswith("-mix") for shape in plan.shapes)
    assert Plan.read(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(("refits", "width"), ((True, None), (False, 64)))
def test_where_a_plan_refits_narrower_experts_must_win_clearly(refits, width):
    def tried(width: int | None, masked: float) -> TriedShape:
        return TriedShape(
            top_k=2,
            expert_width=width,
            experts_kept=8,
            quantization="Q4_K_M",
            masked_kl_nats=masked,
            quantization_kl_nats=0.02,
            kl_nats=masked + 0.02,
            file_bytes=1,
            decode_tokens_per_s=None,
        )

    whole, narrow = tried(None, 0.5), tried(64, 0.3)
    assert min(whole, narrow, key=lambda one: compared_nats(one, refits)).expert_width == width
    clear = tried(64, 0.2)
    assert min(whole, clear, key=lambda one: compared_nats(one, refits)) is clear
