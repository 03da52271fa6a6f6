"""What the learning study says of its curves: factors, gains, shares, levels, tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

METRIC = "eval/x/mean"


def rows_of(values: list[float], metric: str = METRIC) -> list[dict[str, Any]]:
    """A curve with an evaluation every 100 queries, 10 seconds and 1000 forwards."""
    return [
        {"seed": 0, "iteration": i, "queries": 100 * i, "seconds": 10.0 * i, "forwards": 1000 * i, metric: value}
        for i, value in enumerate(values)
    ]


def test_the_factor_to_pass_is_where_the_slow_arm_has_what_it_ends_with_over_where_the_fast_one_has(
    load: Callable[[str], ModuleType],
):
    summaries = load("learning.summaries")
    slow = [rows_of([0.0, 1.0, 2.0])] * 4  # 2.0 after 200 queries
    fast = [
        rows_of([0.0, 4.0]),  # after 50: 4 times
        rows_of([1.0, 1.5, 2.5]),  # after 150: 4 / 3 times
        rows_of([0.0, 1.0, 1.5]),  # never
        rows_of([3.0, 4.0]),  # from the start
    ]
    found = summaries.pass_factor(fast, slow, METRIC, "queries")
    assert found["mean"] == pytest.approx((4 + 4 / 3) / 2)
    assert (found["seeds_that_pass"], found["never"], found["from_the_start"]) == (2, 1, 1)
    assert summaries.pass_factor(fast[2:3], slow[:1], METRIC, "seconds")["mean"] is None


def test_a_slow_arm_that_falls_back_is_charged_for_what_it_keeps_only(load: Callable[[str], ModuleType]):
    summaries = load("learning.summaries")
    fast = [rows_of([0.0, 2.0])] * 3
    slow = [
        rows_of([0.0, 1.0, 3.0, 1.0]),  # has its final 1.0 after 100 queries already, the fast arm after 50
        rows_of([1.0, 2.0, 1.0]),  # no higher than it began
        rows_of([1.0, 2.0, 0.5]),
    ]
    found = summaries.pass_factor(fast, slow, METRIC, "queries")
    assert found["mean"] == pytest.approx(2)
    assert (found["seeds_that_pass"], found["slow_has_not_risen"]) == (1, 2)


def test_gains_are_of_each_seeds_own_start(load: Callable[[str], ModuleType]):
    rows: list[dict[str, float]] = [{METRIC: 1.0, "seconds": 0.0}, {"seconds": 5.0}, {METRIC: 1.5, "seconds": 9.0}]
    found = load("learning.summaries").gains([rows, [{METRIC: -2.0, "seconds": 0.0}]], METRIC)
    assert found[0] == [{METRIC: 0.0, "seconds": 0.0}, {METRIC: 0.5, "seconds": 9.0}]
    assert found[1] == [{METRIC: 0.0, "seconds": 0.0}]
    assert rows[0][METRIC] == 1.0


def test_a_share_of_a_gain_is_a_ratio_of_means_with_the_error_of_paired_seeds(load: Callable[[str], ModuleType]):
    share = load("learning.summaries").share
    found = share([0.5, 1.0, 1.5], [1.0, 2.0, 3.0])  # each exactly half
    assert found["mean"] == pytest.approx(0.5)
    assert found["standard_error"] == pytest.approx(0.0)
    found = share([0.4, 0.6], [1.0, 1.0])
    assert found["mean"] == pytest.approx(0.5)
    assert found["standard_error"] == pytest.approx(0.1)  # that of the mean of 0.4 and 0.6
    assert share([1.0], [0.0])["mean"] is None


def test_arms_are_compared_at_the_highest_reward_that_all_of_them_attain(load: Callable[[str], ModuleType]):
    realism = load("learning.realism")

    def seed(sizes: list[float]) -> list[dict[str, Any]]:
        rows = rows_of(sizes, realism._REWARD)
        return [{**row, **dict.fromkeys(realism._REAL, 1.0 - row["queries"] / 1000)} for row in rows]

    curves = {"a": [seed([-1.4, -1.3, -1.1])], "b": [seed([-1.4, -1.3, -1.2]), seed([-1.3, -1.0, -1.4])]}
    level = realism.common_level(curves)
    assert level == -1.2
    there = realism.at_equal_reward(curves, level)
    assert there["a"][realism._REAL[0]]["mean"] == pytest.approx(0.85)  # at 150 queries
    assert there["b"][realism._REAL[0]]["mean"] == pytest.approx((0.8 + 1 - 0.1 / 3) / 2)  # at 200 and at 33


def test_a_table_and_a_picture_show_every_arm(load: Callable[[str], ModuleType], tmp_path: Path):
    summaries = load("learning.summaries")
    curves = {"a": [rows_of([0.0, 1.0]), rows_of([0.0, 3.0])], "b": [rows_of([0.0, 1.0]), rows_of([0.0, 2.0])]}
    lines = summaries.table(curves, [METRIC]).splitlines()
    assert lines[0] == "| arm | queries | seconds | forwards | x, start | end |"
    assert lines[2] == "| a | 100 | 10 | 1,000 | 0.000 | 2.000 +- 1.000 |"
    assert summaries.ahead_of(curves, "b", METRIC)["a"] == {"mean": 0.5, "standard_error": 0.5}
    summaries.write_curves(curves, tmp_path / "out", "title")
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert (tmp_path / "out.csv").read_text().splitlines()[0].startswith("arm,seed,iteration,queries")
