"""The plan stage: measured choices, honest notes, refusals before work, the same bytes twice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_edge.compression.masking import masked_kl
from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.errors import ConfigError, InfeasibleError, InputRejected
from moe_edge.contracts.plan import Plan
from moe_edge.families.loading import load_model
from moe_edge.formulas.selection import CRITERIA
from moe_edge.stages import plan as stage
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics
from tests.compression.plan_helpers import NO_SHARE, config
from tests.tiny import tiny_checkpoint

EXPERTS, LAYERS, ROWS, LENGTH = 8, 2, 6, 16


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher"), "qwen3_moe", experts=EXPERTS, layers=LAYERS)


def write_profile(folder: Path, experts: int = EXPERTS, cka_tokens: int = 64) -> Path:
    """Statistics with a plain order (expert 0 is used most) and random rows."""
    folder.mkdir(parents=True, exist_ok=True)
    ramp = torch.arange(experts, 0, -1, dtype=torch.float64).expand(LAYERS, experts)
    square = torch.eye(experts, dtype=torch.float64).expand(LAYERS, experts, experts)
    features, layers = torch.zeros(LAYERS, experts, 4, dtype=torch.float64), torch.ones(LAYERS, dtype=torch.float64)
    tensors = {
        "counts_LE": ramp.long() * 10, "gate_sum_LE": ramp, "norm_sum_LE": ramp * 20,
        "norm_sq_sum_LE": ramp.flip(1) * 30,
        "gated_norm_sum_LE": ramp.sqrt(), "norm_max_LE": ramp, "out_sum_LED": features, "out_sq_sum_LED": features,
        "router_entropy_L": layers, "coroute_LEE": square.long(), "gate_mass_L": layers, "hsic_LEE": square,
        "gated_hsic_LEE": square, "layer_hsic_LL": torch.eye(LAYERS, dtype=torch.float64), "sink_share_L": layers * 0,
    }  # fmt: skip
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    Statistics(**copies, cka_tokens=cka_tokens, tokens=360).save(folder / "statistics.safetensors")
    ids = np.random.default_rng(0).integers(3, 300, size=(ROWS, LENGTH)).astype(np.int32)
    TokenRows(ids, ids.size).save(folder / "rows.safetensors")
    return folder


def run(teacher: Path, out: Path, *settings: str, profile: Path | None = None) -> tuple[dict, Plan]:
    out.mkdir(parents=True, exist_ok=True)
    wanted = ("plan.tokens=64", *settings)
    folder = profile or write_profile(out / "profile")
    summary = stage.run(StageContext(config(*wanted), teacher, "digest", out, inputs={"profile": folder}))
    return summary, Plan.read(out / "plan.json")


def test_auto_takes_the_least_masked_kl_of_all_criteria(teacher, tmp_path):
    summary, plan = run(teacher, tmp_path)
    assert {c.criterion for c in plan.candidates} == set(CRITERIA)
    kls = [c.kl_nats for c in plan.candidates]
    assert kls == sorted(kls) and plan.predicted_kl_nats == kls[0] == min(kls) > 0
    assert plan.experts_kept == 5 and len(plan.kept) == LAYERS and plan.prunes
    assert plan.candidates[0].n_tokens == 64 and plan.candidates[0].kl_nats_ci95 is not None
    assert summary["criterion"] == plan.criterion and summary["predicted_kl_nats"] == kls[0] and "kept" not in summary
    json.dumps(summary)


def test_the_prediction_is_the_masked_kl_of_the_plan_on_the_last_rows(teacher, tmp_path):
    _, plan = run(teacher, tmp_path, "plan.criterion=frequency")
    assert plan.kept == dict.fromkeys(range(LAYERS), [0, 1, 2, 3, 4])
    assert {c.criterion for c in plan.candidates} == {"frequency", "random"}
    ids = torch.from_numpy(TokenRows.load(tmp_path / "profile" / "rows.safetensors").ids_NS).long()[-4:]
    again = masked_kl(load_model(teacher), {"x": plan.kept}, ids)["x"]
    assert plan.predicted_kl_nats == pytest.approx(again.kl_nats, rel=1e-6)
    assert any("rows 2..5 of 6 (64 tokens)" in note for note in plan.notes)


def test_the_same_inputs_give_the_same_bytes(teacher, tmp_path):
    run(teacher, tmp_path / "a")
    run(teacher, tmp_path / "b")
    assert (tmp_path / "a/plan.json").read_bytes() == (tmp_path / "b/plan.json").read_bytes()


def test_the_seed_reaches_the_random_choice(teacher, tmp_path):
    kept = [run(teacher, tmp_path / s, "plan.criterion=random", f"plan.seed={s}")[1].kept for s in ("1", "2")]
    assert kept[0] != kept[1]


def test_keeping_all_needs_no_profile_and_says_why(teacher, tmp_path):
    _, plan = run(teacher, tmp_path, "plan.experts=1.0", profile=tmp_path / "none")
    assert not plan.prunes and plan.candidates == [] and plan.predicted_kl_nats is None
    assert plan.kept[1] == list(range(EXPERTS)) and any("no masked KL" in note for note in plan.notes)


def test_a_smaller_top_k_alone_is_measured(teacher, tmp_path):
    _, plan = run(teacher, tmp_path, "plan.experts=1.0", "plan.top_k=1")
    assert not plan.prunes and plan.top_k == 1 and plan.predicted_kl_nats > 0.001
    assert plan.criterion == stage.KEEP_ALL


def test_a_kl_beyond_the_limit_is_refused_unless_forced(teacher, tmp_path):
    with pytest.raises(InfeasibleError, match="the limit is 1e-06") as caught:
        run(teacher, tmp_path / "a", "plan.max_kl_nats=1e-6")
    assert caught.value.exit_code == 3 and "frequency" in str(caught.value)
    assert not (tmp_path / "a/plan.json").exists()
    assert run(teacher, tmp_path / "b", "plan.max_kl_nats=1e-6", "plan.force=true")[1].predicted_kl_nats > 1e-6


def test_quantizing_harder_replaces_pruning_where_it_loses_less(teacher, tmp_path, monkeypatch):
    """A weights budget just below all experts at Q4_K_M; this teacher suffers far more from a lost expert."""
    from moe_edge.compression import allocation

    space = allocation.header_plan(inspect_checkpoint(teacher), config(NO_SHARE)).space
    limit = space.option(EXPERTS, allocation.Packing("gguf", "Q4_K_M")).estimate.file_bytes - 1
    settings = (NO_SHARE, f"target.budget.weights={limit}", "plan.criterion=msan")
    monkeypatch.setattr(allocation, "RECIPE_KL_NATS", dict.fromkeys(allocation.HARDER_ORDER, 0.0))
    _, plan = run(teacher, tmp_path / "a", *settings)
    assert not plan.prunes and plan.quantization != "Q4_K_M" and plan.estimate.file_bytes <= limit
    assert plan.candidates and plan.predicted_kl_nats is None and "before recovery" in plan.competitor
    dear = {name: 9.0 for name in allocation.HARDER_ORDER} | {"Q4_K_M": 0.0}
    monkeypatch.setattr(allocation, "RECIPE_KL_NATS", dear)
    _, plan = run(teacher, tmp_path / "b", *settings)
    assert plan.prunes and plan.quantization == "Q4_K_M" and "loses more" in plan.competitor


def test_cka_diverse_needs_cka(teacher, tmp_path):
    without = write_profile(tmp_path / "profile", cka_tokens=0)
    with pytest.raises(ConfigError, match="cka-diverse needs a profile with CKA"):
        run(teacher, tmp_path / "a", "plan.criterion=cka-diverse", profile=without)
    _, plan = run(teacher, tmp_path / "b", profile=without)
    assert {c.criterion for c in plan.candidates} == set(CRITERIA) - {"cka-diverse"}


def test_a_profile_of_another_teacher_is_rejected(teacher, tmp_path):
    with pytest.raises(InputRejected, match="belongs to another teacher"):
        run(teacher, tmp_path, profile=write_profile(tmp_path / "profile", experts=6))


def test_a_choice_no_better_than_chance_is_called_that(teacher, tmp_path):
    results = {
        "ean": stage.MaskedKl(1.0, None, 4, (1.0, 1.0)),
        "random": stage.MaskedKl(1.0, None, 4, (0.9, 1.1)),
    }
    assert "not clearly better than a random choice" in stage._honesty("ean", results)[0]
    assert "random choice did best" in stage._honesty("random", results)[0]
    results["random"] = stage.MaskedKl(2.0, None, 4, (2.1, 1.9))
    assert stage._honesty("ean", results) == []


def test_a_dry_run_reads_headers_only(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "load_model", lambda *_args, **_kw: pytest.fail("a dry run loads no model"))
    report = stage.dry_run(inspect_checkpoint(teacher), config())
    assert report["choice"]["experts_kept"] == 5 and report["criteria"] == [] and report["budget"] == {"experts": 0.625}
    assert any(row["experts_kept"] == 8 and row["fits"] for row in report["options"])
    assert report["teacher"]["experts"] == EXPERTS
    json.dumps(report)
    with_profile = stage.dry_run(inspect_checkpoint(teacher), config(), write_profile(tmp_path / "profile"))
    shares = {row["criterion"]: row["routed_share_kept"] for row in with_profile["criteria"]}
    assert shares["frequency"] == pytest.approx(30 / 36) and set(shares) == set(CRITERIA)
    with pytest.raises(InfeasibleError):
        stage.dry_run(inspect_checkpoint(teacher), config("target.budget.weights=10KiB"))
