"""A dry run: options and the choice from headers alone, shares of the routing where there is a profile."""

import json
from pathlib import Path

import pytest

from moe_edge.contracts.errors import InfeasibleError
from moe_edge.formulas.selection import CRITERIA
from moe_edge.planning import scoring
from moe_edge.planning.allocation import header_plan
from moe_edge.planning.dry_run import preview_plan, shown_options
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.planning.plan_helpers import config
from tests.stages.inputs import EXPERTS, LAYERS, opened, write_profile
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher"), "qwen3_moe", experts=EXPERTS, layers=LAYERS)


def test_a_dry_run_reads_headers_only(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "open_scorer", lambda *_args, **_kw: pytest.fail("a dry run loads no model"))
    report = preview_plan(opened(teacher), config()).to_dict()
    assert report["choice"]["experts_kept"] == 5 and report["criteria"] == [] and report["budget"] == {"experts": 0.625}
    assert any(row["experts_kept"] == 8 and row["fits"] for row in report["options"])
    assert report["teacher"]["experts"] == EXPERTS
    json.dumps(report)
    with_profile = preview_plan(opened(teacher), config(), write_profile(tmp_path / "profile").path).to_dict()
    shares = {row["criterion"]: row["routed_share_kept"] for row in with_profile["criteria"]}
    assert shares["frequency"] == pytest.approx(30 / 36) and set(shares) == set(CRITERIA)
    with pytest.raises(InfeasibleError):
        preview_plan(opened(teacher), config("target.budget.weights=10KiB"))


def test_the_options_of_a_dry_run_hold_the_choice(teacher):
    answer = header_plan(inspect_checkpoint(teacher), config())
    options = shown_options(answer)
    assert any(o.experts == 5 and o.packing.name == "Q4_K_M" and o.fits for o in options)
    assert {o.experts for o in options} >= {8, 6, 5, 4}
