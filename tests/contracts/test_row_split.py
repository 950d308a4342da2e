"""Who may see which calibration rows: what is fitted is never judged on its own rows, by numbers and through the real stages."""

from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_edge.compression import layers
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.row_split import HEALTH_TOKENS, HELD_OUT_SHARE, RowSplit
from moe_edge.planning import judging as judging_room
from moe_edge.planning import scoring, shape_trials
from moe_edge.stages import compress
from tests.planning.plan_helpers import config
from tests.stages.inputs import measured_statistics, opened, random_rows, run_plan, write_plan, write_profile
from tests.tiny import tiny_checkpoint

ROWS = (2, 3, 4, 6, 19, 20, 21, 128, 1000)
ROW_TOKENS = (8, 16, 512, 4096)
TOKENS = (1, 15, 512, 4096, 16384, 10**7)


def of_every_size() -> list[tuple[RowSplit, int, int]]:
    """(split, tokens that an action is fitted on, tokens that judge a plan)."""
    return [
        (RowSplit(rows, length), fit, judge) for rows, length, fit, judge in product(ROWS, ROW_TOKENS, TOKENS, TOKENS)
    ]


def test_what_is_fitted_searched_or_trained_on_never_judges() -> None:
    for split, action_tokens, plan_tokens in of_every_size():
        fit, search, judge = split.fit(action_tokens, plan_tokens), split.search(plan_tokens), split.judge(plan_tokens)
        train, held_out, everything = split.train(), split.held_out(), range(split.rows)
        for seen, unseen in ((fit, judge), (search, judge), (fit, held_out), (train, held_out)):
            assert not set(seen) & set(unseen), (split, action_tokens, plan_tokens)
        for each in (fit, search, judge, train, held_out, split.health()):
            assert each and each[0] >= 0 and each[-1] < split.rows and each.step == 1, (split, each)
        assert [*search, *judge] == [*train, *held_out] == [*everything], "nothing is wasted"
        assert fit[0] == 0 and not split.shared


def test_as_many_rows_as_hold_the_tokens_where_there_are_enough() -> None:
    split = RowSplit(128, 512)
    assert split.judge(4096) == range(120, 128) and split.search(4096) == range(120)
    assert split.fit(16384, 4096) == range(32), "fewer than may be seen"
    assert split.fit(10**7, 4096) == range(120) and split.fit(10**7, 1) == range(122), "of which 122.. are held out"
    assert split.held_out() == range(128 - round(128 * HELD_OUT_SHARE), 128) == range(122, 128)
    assert split.health() == range(128 - HEALTH_TOKENS // 512, 128)
    assert RowSplit(40, 100).judge(299) == range(38, 40), "whole rows"
    assert RowSplit(40, 100).judge(1) == range(39, 40) and RowSplit(40, 100).fit(1, 1) == range(1), "at least one"


def test_however_much_shall_judge_a_row_is_left_to_fit_on() -> None:
    assert RowSplit(3, 16).judge(10**7) == range(1, 3)
    assert RowSplit(2, 16).judge(10**7) == range(1, 2) and RowSplit(2, 16).fit(10**7, 10**7) == range(1)


def test_a_single_row_is_everything_and_says_so() -> None:
    split = RowSplit(1, 16)
    assert split.shared and split.fit(64, 64) == split.judge(64) == split.health() == range(1)
    assert not split.search(64), "a search that judges itself is none"
    for ask in (split.train, split.held_out):
        with pytest.raises(ConfigError, match="too little calibration text"):
            ask()


class Seen:
    """Which calibration rows a function was given, by what it does with them."""

    def __init__(self, ids_NS: Tensor, patch: pytest.MonkeyPatch) -> None:
        self.number = {tuple(row): number for number, row in enumerate(ids_NS.tolist())}
        self.rows: dict[str, set[int]] = defaultdict(set)
        self.patch = patch

    def watch(self, what: str, module: Any, name: str, place: int) -> None:
        """Note the rows in the argument at `place` of every call."""
        real: Callable[..., Any] = getattr(module, name)

        def noting(*given: Any, **options: Any) -> Any:
            self.rows[what] |= {self.number[tuple(row)] for row in given[place].tolist()}
            return real(*given, **options)

        self.patch.setattr(module, name, noting)


@pytest.mark.parametrize(("rows", "fitted", "judging"), [(2, {0}, {1}), (3, {0}, {1, 2}), (6, {0, 1}, {2, 3, 4, 5})])
def test_through_plan_and_compress_nothing_is_judged_on_rows_that_it_was_fitted_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, fitted: set[int], judging: set[int]
) -> None:
    """A plan that refits shapes to compare them, one that searches, and its refit. Four rows judge, if there are more."""
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe", experts=8, width=64)
    ids_NS = random_rows(rows, 16)
    profile = write_profile(tmp_path / "profile", measured_statistics(teacher, ids_NS), ids_NS)
    seen = Seen(torch.from_numpy(ids_NS), monkeypatch)
    seen.watch("judged", scoring, "masked_kl_rows", 2)
    seen.watch("judged", shape_trials, "student_kl", 3)
    seen.watch("searched", judging_room, "search", 2)
    seen.watch("fitted", layers, "walk_layers", 1)
    shapes = ("plan.top_k=auto", "plan.expert_width=auto", "plan.criterion=frequency")
    _, plan = run_plan(teacher, tmp_path / "shapes", *shapes, profile=profile)
    assert any(shape.refitted_kl_nats is not None for shape in plan.shapes)
    assert seen.rows == {"judged": judging, "fitted": fitted}
    seen.rows.clear()
    _, plan = run_plan(teacher, tmp_path / "plan", "plan.expert_width=keep", "plan.search_tokens=3000", profile=profile)
    assert plan.prunes and plan.compensate
    assert seen.rows == {"judged": judging, "searched": fitted}
    seen.rows.clear()
    folder, out = write_plan(tmp_path / "plan", plan), tmp_path / "out"
    out.mkdir()
    compress.run(config("plan.tokens=64"), opened(teacher), out, profile=profile, plan=folder)
    assert seen.rows == {"fitted": fitted}
