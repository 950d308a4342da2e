"""What is said and written about a training."""

import json
from pathlib import Path

import pytest

from moe_edge.contracts.artifacts import HeldOut
from moe_edge.distillation.outcome import Outcome, write_outcome
from moe_edge.distillation.recovery import StageRecord


def test_losses_are_means_over_the_ends_of_a_stage() -> None:
    log = [{"total_loss": float(step), "kl_loss": 2.0 * step} for step in range(20)]
    log[19]["ce_loss"] = 5.0  # a stage whose other rows are the student's own words
    record = StageRecord("all", 20, 640, "live", log, 1.5)
    outcome = Outcome([record], HeldOut(kl_nats=0.2), HeldOut(kl_nats=0.1))
    summary = outcome.summary(64, "words", "no room")
    (stage,) = summary.stages
    assert (stage.stage, stage.steps, stage.tokens, stage.teacher) == ("all", 20, 640, "live")
    assert stage.first_and_last == {"total_loss": (0.5, 18.5), "kl_loss": (1.0, 37.0), "ce_loss": (None, 5.0)}
    assert summary.seconds_per_stage == {"all": 1.5} and summary.cka == "no room"


@pytest.mark.parametrize("nats", [0.3, float("nan")])
def test_a_student_that_is_not_better_is_not_kept(nats: float) -> None:
    outcome = Outcome([], HeldOut(kl_nats=0.2), HeldOut(kl_nats=nats))
    assert not outcome.better and outcome.summary(64, "words", "no room").kept == "untrained"


@pytest.mark.parametrize("name", ["kl_nats", "projected_kl_nats"])
def test_the_metrics_name_the_distance_that_was_measured(name: str, tmp_path: Path) -> None:
    outcome = Outcome([], HeldOut.model_validate({name: 0.2}), HeldOut.model_validate({name: 0.1}))
    assert outcome.nats == (0.2, 0.1) and outcome.better
    write_outcome(tmp_path, [], outcome.summary(64, "words", "no room"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["after"] == {name: 0.1, "cka_mean": None, "cka_by_layer": None}
