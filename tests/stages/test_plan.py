"""The plan stage: measured choices, honest notes, refusals before work, the same bytes twice."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_edge.contracts.artifacts import ProfileFolder
from moe_edge.contracts.errors import ConfigError, InfeasibleError, InputRejected
from moe_edge.contracts.quantization import LEVELS
from moe_edge.formulas.selection import CRITERIA, NEEDS_EVIDENCE_BLOCKS
from moe_edge.models.loading import load_model
from moe_edge.planning import curve, judging, sensitivity
from moe_edge.planning.allocation import header_plan
from moe_edge.planning.bits import Sensitivity, recipe_types
from moe_edge.planning.document import KEEP_ALL
from moe_edge.planning.estimate import Packing
from moe_edge.planning.scoring import WholeScorer
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.rows import TokenRows
from tests.planning.plan_helpers import NO_SHARE, config
from tests.stages.inputs import EXPERTS, LAYERS, ROWS, plain_statistics, random_rows, run_plan, write_profile
from tests.summaries import summary_of
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher"), "qwen3_moe", experts=EXPERTS, layers=LAYERS)


def test_auto_takes_the_least_masked_kl_of_all_criteria(teacher, tmp_path):
    summary, plan = run_plan(teacher, tmp_path)
    assert {c.criterion for c in plan.candidates} == {*CRITERIA, "search"}
    kls = [c.kl_nats for c in plan.candidates]
    assert kls == sorted(kls) and plan.predicted_kl_nats == kls[0] == min(kls) > 0
    assert plan.experts_kept == 5 and len(plan.kept) == LAYERS and plan.prunes
    assert plan.candidates[0].n_tokens == 64 and plan.candidates[0].kl_nats_ci95 is not None
    assert summary.notes == plan.notes != []


def test_the_prediction_is_the_masked_kl_of_the_plan_on_the_last_rows(teacher, tmp_path):
    _, plan = run_plan(teacher, tmp_path, "plan.criterion=frequency")
    assert plan.kept == dict.fromkeys(range(LAYERS), [0, 1, 2, 3, 4])
    assert {c.criterion for c in plan.candidates} == {"frequency", "random"}
    ids = torch.from_numpy(TokenRows.load(tmp_path / "profile" / "rows.safetensors").ids_NS).long()[-4:]
    again = WholeScorer(load_model(teacher)).masked_kl({"x": plan.kept}, ids)["x"]
    assert plan.predicted_kl_nats == pytest.approx(again.kl_nats, rel=1e-6)
    assert any("rows 2..5 of 6 (64 tokens)" in note for note in plan.notes)


def test_the_same_inputs_give_the_same_bytes(teacher, tmp_path):
    run_plan(teacher, tmp_path / "a")
    run_plan(teacher, tmp_path / "b")
    assert (tmp_path / "a/plan.json").read_bytes() == (tmp_path / "b/plan.json").read_bytes()


def test_the_seed_reaches_the_random_choice(teacher, tmp_path):
    kept = [run_plan(teacher, tmp_path / s, "plan.criterion=random", f"plan.seed={s}")[1].kept for s in ("1", "2")]
    assert kept[0] != kept[1]


def test_keeping_all_needs_no_profile_and_says_why(teacher, tmp_path):
    _, plan = run_plan(
        teacher, tmp_path, "plan.experts=1.0", profile=ProfileFolder(tmp_path / "none", "", summary_of("profile"))
    )
    assert not plan.prunes and plan.candidates == [] and plan.predicted_kl_nats is None
    assert plan.kept[1] == list(range(EXPERTS)) and any("no masked KL" in note for note in plan.notes)


def test_a_smaller_top_k_alone_is_measured(teacher, tmp_path):
    _, plan = run_plan(teacher, tmp_path, "plan.experts=1.0", "plan.top_k=1")
    assert not plan.prunes and plan.top_k == 1 and plan.predicted_kl_nats > 0.001
    assert plan.criterion == KEEP_ALL


def test_a_kl_beyond_the_limit_is_refused_unless_forced(teacher, tmp_path):
    with pytest.raises(InfeasibleError, match="the limit is 1e-06") as caught:
        run_plan(teacher, tmp_path / "a", "plan.max_kl_nats=1e-6")
    assert caught.value.exit_code == 3 and "frequency" in str(caught.value)
    assert not (tmp_path / "a/plan.json").exists()
    assert run_plan(teacher, tmp_path / "b", "plan.max_kl_nats=1e-6", "plan.force=true")[1].predicted_kl_nats > 1e-6


def test_quantizing_harder_replaces_pruning_where_it_loses_less(teacher, tmp_path, monkeypatch):
    """A weights budget just below all experts at Q4_K_M, where the bits of every class are free."""
    space = header_plan(inspect_checkpoint(teacher), config(NO_SHARE)).space
    limit = space.option(EXPERTS, Packing("gguf", "Q4_K_M")).estimate.file_bytes - 1
    settings = (NO_SHARE, f"target.budget.weights={limit}", "plan.criterion=msan", "plan.curve_tokens=32")
    cells = recipe_types("Q8_0", LAYERS)
    for name, nats in (("a", 1e-6), ("b", 9.0)):  # of the coarsest type: bits cost next to nothing, or a lot
        table = {kind: nats / 4**place for place, kind in enumerate(LEVELS)}
        known = Sensitivity(dict.fromkeys(cells, table), "measured", 32)
        monkeypatch.setattr(sensitivity, "measure_sensitivity", lambda *_args, known=known, **_options: known)
        _, plan = run_plan(teacher, tmp_path / name, *settings)
        assert plan.estimate.file_bytes <= limit and plan.candidates and "before recovery" in plan.competitor
        assert plan.quantization_kl_source == "measured" and bool(plan.quantization_by_class) == (name == "a")
        assert plan.prunes == (name == "b") and (plan.predicted_kl_nats is None) == (name == "a")
        assert len(plan.kept[0]) == plan.experts_kept
    assert plan.quantization == "Q8_0" and plan.quantization_kl_nats["Q8_0"] > 0, (
        "few experts leave room for the recipe"
    )


@pytest.mark.parametrize("experts", [EXPERTS, EXPERTS - 2])
def test_a_number_of_experts_is_met_by_a_mix_of_types_where_its_recipe_does_not_fit(teacher, tmp_path, experts):
    space = header_plan(inspect_checkpoint(teacher), config(NO_SHARE)).space
    limit = space.option(experts, Packing("gguf", "Q4_K_M")).estimate.file_bytes - 1
    settings = (f"target.budget.weights={limit}", "plan.criterion=msan", "plan.curve_tokens=32")
    _, plan = run_plan(teacher, tmp_path, NO_SHARE, f"plan.experts={experts}", *settings, "plan.sensitivity_tokens=32")
    assert plan.experts_kept == experts and plan.estimate.file_bytes <= limit
    assert plan.quantization_by_class and plan.quantization_kl_source == "measured"


def test_the_safe_ratio_curve_lies_beside_the_plan(teacher, tmp_path):
    _, plan = run_plan(teacher, tmp_path, "plan.criterion=frequency", "plan.curve_tokens=32")
    data = json.loads((tmp_path / "curve.json").read_text())
    assert data["criterion"] == "frequency" and data["n_tokens"] == 32
    assert [point["experts"] for point in data["points"]] == [8, 7, 6, 5, 4, 3]
    assert f"chosen: {plan.experts_kept}" in (tmp_path / "curve.svg").read_text()


def test_an_unsafe_ratio_stops_unless_forced(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(curve, "UNSAFE_KL_NATS", 1e-6)
    with pytest.raises(InfeasibleError, match="the safe limit"):
        run_plan(teacher, tmp_path / "a", "plan.criterion=frequency")
    assert (tmp_path / "a/curve.json").exists() and not (tmp_path / "a/plan.json").exists()
    _, plan = run_plan(teacher, tmp_path / "b", "plan.criterion=frequency", "plan.force=true")
    assert any(note.startswith("Forced") for note in plan.notes)


def test_cka_diverse_needs_cka(teacher, tmp_path):
    without = write_profile(tmp_path / "profile", plain_statistics(cka_tokens=0))
    with pytest.raises(ConfigError, match="cka-diverse needs a profile with CKA"):
        run_plan(teacher, tmp_path / "a", "plan.criterion=cka-diverse", profile=without)
    _, plan = run_plan(teacher, tmp_path / "b", profile=without)
    assert {c.criterion for c in plan.candidates} == {*CRITERIA, "search"} - set(NEEDS_EVIDENCE_BLOCKS)


def test_the_search_reads_other_rows_than_those_that_judge(teacher, tmp_path, monkeypatch):
    read = {}
    real = judging.search
    monkeypatch.setattr(judging, "search", lambda *args, **kw: read.update(rows=args[2], kw=kw) or real(*args, **kw))
    _, plan = run_plan(teacher, tmp_path, "plan.search_tokens=3000", "plan.seed=5")
    rows = torch.from_numpy(TokenRows.load(tmp_path / "profile" / "rows.safetensors").ids_NS).long()
    assert torch.equal(read["rows"], rows[:2]), "the last four judge"
    assert read["kw"]["budget_tokens"] == 3000 and read["kw"]["seed"] == 5
    note = next(note for note in plan.notes if note.startswith("'search' started from"))
    assert "of 3000 tokens" in note and "the first 2 calibration rows" in note


@pytest.mark.parametrize(("rows", "tokens", "why"), [(ROWS, 0, "search_tokens is 0"), (1, 3000, "no calibration row")])
def test_without_rows_or_budget_there_is_no_search(teacher, tmp_path, rows, tokens, why):
    profile = write_profile(tmp_path / "profile", ids_NS=random_rows(rows))
    _, plan = run_plan(teacher, tmp_path, f"plan.search_tokens={tokens}", profile=profile)
    assert "search" not in {c.criterion for c in plan.candidates}
    assert any(note.startswith("No search:") and why in note for note in plan.notes)


def test_a_named_criterion_is_taken_without_a_search(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "search", lambda *_args, **_kw: pytest.fail("nobody asked for a search"))
    assert run_plan(teacher, tmp_path, "plan.criterion=loo-mse")[1].criterion == "loo-mse"


def test_super_experts_stay_and_the_plan_says_so(teacher, tmp_path):
    """The last expert of the first layer has by far the largest output and the least of everything else."""
    largest = torch.ones(LAYERS, EXPERTS, dtype=torch.float64)
    largest[0, EXPERTS - 1] = 100.0
    profile = write_profile(tmp_path / "profile", replace(plain_statistics(), norm_max_LE=largest))
    _, plan = run_plan(teacher, tmp_path / "a", "plan.search_tokens=3000", profile=profile)
    assert plan.kept[0][-1] == EXPERTS - 1 and any("super experts" in note for note in plan.notes)
    _, plan = run_plan(teacher, tmp_path / "b", "plan.criterion=ean", "plan.super_expert_guard=false", profile=profile)
    assert plan.kept[0] == [0, 1, 2, 3, 4] and not any("super experts" in note for note in plan.notes)


def test_a_streamed_teacher_is_judged_and_not_searched(teacher, tmp_path):
    _, whole = run_plan(teacher, tmp_path / "a", "plan.search_tokens=0")
    _, streamed = run_plan(teacher, tmp_path / "b", "profile.mode=layerwise")
    assert any("does not fit in memory" in note for note in streamed.notes)
    assert streamed.kept == whole.kept
    assert streamed.predicted_kl_nats == pytest.approx(whole.predicted_kl_nats, rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "b").iterdir() if path.is_dir()) == ["profile"]


def test_a_profile_of_another_teacher_is_rejected(teacher, tmp_path):
    with pytest.raises(InputRejected, match="belongs to another teacher"):
        run_plan(teacher, tmp_path, profile=write_profile(tmp_path / "profile", plain_statistics(experts=6)))


def test_where_only_a_mix_of_types_is_fast_enough_it_is_measured_and_no_expert_need_go(teacher, tmp_path):
    """A speed that no recipe reaches at the teacher's top-k; dropping experts would not help."""
    bandwidth = "target.hardware.bandwidth_gb_per_s={value: 10.0, source: a test, confidence: assumed}"
    fast = (NO_SHARE, bandwidth, "target.runtime.kv_cache=f16")
    space = header_plan(inspect_checkpoint(teacher), config(*fast)).space
    best = max(
        space.option(2, Packing("gguf", name)).estimate.decode_tokens_per_s for name in ("Q2_K", "Q3_K_M", "Q4_0")
    )
    wishes = (
        *fast,
        f"target.budget.decode_tokens_per_s={best + 1}",
        "plan.criterion=frequency",
        "plan.curve_tokens=32",
    )
    answer = header_plan(inspect_checkpoint(teacher), config(*wishes))
    assert answer.keeps_all and answer.choice.packing.mix and answer.needs_measuring
    _, plan = run_plan(teacher, tmp_path, *wishes, "plan.sensitivity_tokens=32")
    assert plan.estimate.decode_tokens_per_s > best and plan.quantization_kl_source == "measured"
    assert plan.quantization_by_class and (tmp_path / "curve.json").exists()
    assert any(note == "The candidates' masked KL is that of keeping 6 experts." for note in plan.notes) != plan.prunes


@pytest.mark.parametrize("streamed", [True, False], ids=["asked to be streamed", "larger than memory"])
def test_a_teacher_that_is_not_held_whole_is_not_refitted_nor_narrowed(teacher, tmp_path, monkeypatch, streamed):
    """What compress could not do later, a plan does not promise."""
    _, plan = run_plan(teacher, tmp_path / "a", "plan.criterion=frequency")
    assert plan.compensate
    wishes = ["plan.criterion=frequency", "plan.expert_width=auto", "plan.top_k=auto"]
    if streamed:
        wishes.append("profile.mode=layerwise")
    else:
        monkeypatch.setattr("moe_edge.compression.on_disk.can_be_edited", lambda _headers: False)
    _, plan = run_plan(teacher, tmp_path / "b", *wishes)
    assert not plan.compensate and plan.expert_width is None and {shape.expert_width for shape in plan.shapes} == {None}


def test_a_lower_top_k_alone_is_something_to_recover(teacher, tmp_path):
    assert run_plan(teacher, tmp_path / "a", "plan.experts=1.0", "plan.top_k=1")[1].alters
    assert not run_plan(teacher, tmp_path / "b", "plan.experts=1.0")[1].alters
