"""What is written about a training."""

import pytest

from moe_edge.distillation.outcome import Measured, Outcome


def test_losses_are_means_over_the_ends_of_a_stage() -> None:
    log = [{"total_loss": float(step), "kl_loss": 2.0 * step} for step in range(20)]
    log[19]["ce_loss"] = 5.0  # a stage whose other rows are the student's own words
    record = {"stage": "all", "steps": 20, "tokens": 640, "teacher": "live", "log": log}
    (stage,) = Outcome([record], Measured(0.2, None), Measured(0.1, None)).summary(64, "words")["stages"]
    ends = stage.pop("first_and_last")
    assert stage == {"stage": "all", "steps": 20, "tokens": 640, "teacher": "live"}
    assert ends == {"total_loss": [0.5, 18.5], "kl_loss": [1.0, 37.0], "ce_loss": [None, 5.0]}


@pytest.mark.parametrize("nats", [0.3, float("nan")])
def test_a_student_that_is_not_better_is_not_kept(nats: float) -> None:
    outcome = Outcome([], Measured(0.2, None), Measured(nats, None))
    assert not outcome.better and outcome.summary(64, "words")["kept"] == "untrained"
