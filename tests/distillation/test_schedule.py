"""Rows, steps and learning rates, decided before the first step."""

import logging

import pytest

from moe_edge.contracts.config import DistillConfig, LrMultiplier, StageConfig, TeacherRoutingConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.schedule import (
    full_rate,
    micro_rows,
    multipliers_of,
    rate_factor,
    rows_of_process,
    schedule_stages,
)

NAMES = ["embed.weight", "layers.0.mlp.experts.down_proj", "layers.0.mlp.gate.weight", "norm.weight"]


def config(*stages: StageConfig, **values: object) -> DistillConfig:
    return DistillConfig(stages=list(stages), **values)


def test_shares_of_the_token_budget() -> None:
    halves = [StageConfig(stage_name=name, share=0.5) for name in "ab"]
    first, second = schedule_stages(DistillConfig(batch_rows=4, stages=halves), range(122), 512)
    assert first.steps + second.steps == 65536 // (4 * 512)
    assert first.warmup_steps == 2
    seen = first.rows + second.rows
    assert sorted(seen[:122]) == list(range(122)), "no row twice before every row once"


def test_the_default_is_one_stage_of_single_rows_under_a_live_teacher() -> None:
    (stage,) = schedule_stages(DistillConfig(), range(122), 512)
    assert stage.steps == 65536 // 512 and stage.config.teacher == "live"
    assert all(row.lr_multiplier == 1.0 for row in stage.config.parameter_lr_multipliers)


def test_steps_epochs_and_seeds() -> None:
    stages = (StageConfig(stage_name="a", steps=3), StageConfig(stage_name="b", num_epochs=2))
    a, b = schedule_stages(config(*stages, batch_rows=2), range(9), 64)
    assert a.steps == 3 and b.steps == 9
    again = schedule_stages(config(*stages, batch_rows=2), range(9), 64)
    assert [s.rows for s in again] == [a.rows, b.rows]
    other = schedule_stages(config(*stages, batch_rows=2, seed=1), range(9), 64)
    assert other[0].rows + other[1].rows != a.rows + b.rows


def test_updates_that_repeat_a_batch_leave_no_row_out() -> None:
    """Algorithm 1 of knowledge augmentation trains M times on a batch; the next stage begins where the last one stopped."""
    routing = TeacherRoutingConfig(policy="ka", mode="paper", draws=2)
    stages = (StageConfig(stage_name="a", steps=5, teacher_routing=routing), StageConfig(stage_name="b", steps=2))
    a, b = schedule_stages(config(*stages, batch_rows=2), range(10), 64)
    batches = [a.rows[start : start + 2] for start in range(0, 10, 2)]
    assert a.steps == 5 and batches[0] == batches[1] and batches[2] == batches[3] and batches[4] not in batches[:4]
    distinct = batches[0] + batches[2] + batches[4]
    assert sorted(distinct + b.rows) == list(range(10)), "no row twice before every row once"


def test_a_length_must_be_given_once() -> None:
    for stage in (StageConfig(stage_name="a"), StageConfig(stage_name="a", share=0.5, steps=2)):
        with pytest.raises(ConfigError, match="how long"):
            schedule_stages(config(stage), range(9), 64)
    twins = [StageConfig(stage_name="a", steps=1)] * 2
    with pytest.raises(ConfigError, match="same name"):
        schedule_stages(config(*twins), range(9), 64)


def test_micro_batches() -> None:
    assert [micro_rows(*case) for case in ((4, 512), (4, 1024), (3, 128), (2, 64))] == [2, 1, 1, 2]


def test_every_step_has_a_rate() -> None:
    rates = [rate_factor(step, 10, 2) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] > 0.03
    assert rate_factor(0, 1, 1) == 0.5 and rate_factor(0, 1, 0) == 1


def test_the_first_pattern_wins(caplog: pytest.LogCaptureFixture) -> None:
    patterns = [
        LrMultiplier(pattern=r"experts|gate", lr_multiplier=1),
        LrMultiplier(pattern="mlp|embed", lr_multiplier=0.1),
    ]
    with caplog.at_level(logging.INFO):
        rates = multipliers_of(NAMES, patterns)
    assert list(rates.values()) == [0.1, 1, 1, 1]
    assert "norm.weight" in caplog.text and "full rate" in caplog.text


@pytest.mark.parametrize(
    ("patterns", "message"),
    (
        (["expert", "router"], "matches no parameter"),
        ([".*", "expert"], "earlier patterns take all 1"),
    ),
)
def test_dead_patterns_are_errors(patterns: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        multipliers_of(NAMES, [LrMultiplier(pattern=pattern, lr_multiplier=1) for pattern in patterns])


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        multipliers_of(NAMES, [LrMultiplier(pattern=".*", lr_multiplier=0)])


@pytest.mark.parametrize(
    ("asked", "width", "rate"), (("auto", 256, 5e-4), ("auto", 1024, 3.125e-5), (3e-3, 1024, 3e-3))
)
def test_the_automatic_rate_falls_with_the_width(asked, width, rate):
    assert full_rate(StageConfig(stage_name="all", share=1.0, learning_rate=asked), width) == pytest.approx(rate)


def test_processes_share_a_step_or_are_refused() -> None:
    assert [rows_of_process(8, processes) for processes in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ConfigError, match="(?s)batch_rows: 8.*3 processes.*batch_rows=9"):
        rows_of_process(8, 3)
