"""The live view on an emulated terminal, and plain lines where there is none."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path
from typing import Any

import pyte
import pytest
from rich.console import Console

from rlcm_fast.config import Config, RewardConfig, TrackingConfig
from rlcm_fast.run_folder import live_view
from rlcm_fast.run_folder.display import Clock, PlainLines, duration, is_live
from rlcm_fast.run_folder.live_view import LiveView, sparkline
from rlcm_fast.run_folder.tracking import Tracker
from rlcm_fast.terminal import write_line

CONFIG = {"evaluation.num_images": 65}
EVALUATED = {"eval/shown/mean": 0.85, "eval/shown/std": 0.4, "eval/diversity": 0.25}


class Screen(io.StringIO):
    """A terminal of so many columns and rows."""

    def __init__(self, columns: int = 100, rows: int = 24) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(columns, rows, history=1000)
        self._stream = pyte.Stream(self.screen)

    encoding = "utf-8"  # pyright: ignore[reportAssignmentType]

    def write(self, text: str) -> int:
        self._stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]


class Seconds:
    """A clock that a test sets."""

    value = 0.0

    def __call__(self) -> float:
        return self.value


@pytest.fixture
def now() -> Seconds:
    return Seconds()


def view_on(
    screen: Screen, now: Seconds, monkeypatch: pytest.MonkeyPatch, note: str = "", config: dict[str, Any] = CONFIG
) -> LiveView:
    size = {"width": screen.screen.columns, "height": screen.screen.lines}
    monkeypatch.setattr(live_view, "Console", lambda **settings: Console(**{**settings, **size}))
    view = LiveView(Clock(0, 10, now), config, note, screen)
    view.begin()
    return view


def iteration(number: int, reward: float) -> dict[str, float]:
    rewards = {f"reward/{name}/mean": reward for name in ("total", "jpeg", "shapes_alignment")}
    return {"iteration": number, **rewards, "images_per_second": 33.4, "seconds/iteration": 1.93}


def test_the_whole_view(now: Seconds, monkeypatch: pytest.MonkeyPatch):
    screen = Screen()
    view = view_on(screen, now, monkeypatch)
    for number in range(6):
        now.value += 10.0
        view.show({**iteration(number, float(number)), **(EVALUATED if number == 0 else {})})
    view.show({"iteration": 6, "eval/shown/mean": 0.5, "eval/diversity": 0.2})
    now.value += 3.0
    assert view._live
    view._live.refresh()
    lines = screen.lines
    view.close()
    assert lines[0].startswith("train 6/10 ") and lines[0].endswith("1:03 gone, 0:37 left")
    assert lines[1].split() == ["reward", "now", "trend"]
    assert lines[2].split() == ["total", "5.000", "\u2581\u2582\u2584\u2585\u2587\u2588", "rose"]
    assert [line.split()[0] for line in lines[3:5]] == ["jpeg", "shapes_alignment"]
    # the start and two standard errors around it: 0.85 -+ 2 * 0.4 / sqrt(65 - 1)
    assert lines[6].split() == ["shown", "0.500", "0.850", "0.750", "to", "0.950", "outside"]
    assert lines[7].split() == ["diversity", "of", "all", "images", "0.200", "0.250"]
    assert lines[8].startswith("33.4 images/s, 1.93 s an iteration, ") and lines[8].endswith("iteration 7 since 0:03")


@pytest.mark.parametrize(
    ("size", "std", "shown"),
    [(0, 0.0, "diversity 0.249 0.250"), (13, 0.1, "diversity 0.249 0.250 0.150 to 0.350 inside")],
)
def test_a_set_reward_has_the_band_of_its_groups_and_none_of_a_single_group(
    size: int, std: float, shown: str, now: Seconds, monkeypatch: pytest.MonkeyPatch
):
    screen = Screen()
    config = {**CONFIG, "evaluation.rewards": [{"name": "diversity", "group_size": size}]}  # 65 images, 5 groups
    view = view_on(screen, now, monkeypatch, config=config)
    keys = ("eval/diversity/mean", "eval/diversity/std", "eval/diversity")
    for mean in (0.25, 0.249):
        view.show(dict(zip(keys, (mean, std, 0.3), strict=True)))
    lines = [" ".join(line.split()) for line in screen.lines]
    view.close()
    assert shown in lines and "diversity of all images 0.300 0.300" in lines


def test_a_person_s_reward_is_its_win_rate(
    now: Seconds, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    screen = Screen()
    config = {"rewards": [{"name": "human"}]}
    view = view_on(screen, now, monkeypatch, config=config)
    metrics = {**iteration(0, 1.0), "reward/human/mean": -7e-9, "rating/win_rate": 0.875, "rating/compared": 8.0}
    view.show(metrics)
    lines = [" ".join(line.split()) for line in screen.lines]
    view.close()
    assert "win rate 0.875 0.500 0.146 to 0.854 outside" in lines  # 2 * 0.5 / sqrt(8)
    assert not any(line.startswith(("human", "total")) for line in lines)

    # Plain lines say the same.
    rewards = [RewardConfig("human"), RewardConfig("jpeg")]
    tracking = TrackingConfig(tensorboard=False, live=False)
    tracker = Tracker(tmp_path, Config(tracking=tracking, rewards=rewards, num_iterations=5), 0)
    tracker.log(metrics)
    tracker.close()
    said = capsys.readouterr().err
    assert "iteration 1 of 5: jpeg 1.000, shapes_alignment 1.000, win rate 0.875; 33.4 images/s" in said


@pytest.mark.parametrize(
    ("ends", "shown"),
    [
        ({"low": 0.8, "high": 0.9}, "0.800 to 0.900 inside"),
        ({"low": 0.86}, "at least 0.860 outside"),
        ({"high": 0.9}, "at most 0.900 inside"),
    ],
)
def test_a_guard_has_its_own_band(ends: dict[str, float], shown: str, now: Seconds, monkeypatch: pytest.MonkeyPatch):
    screen = Screen()
    view = view_on(screen, now, monkeypatch)
    bands = {f"guard/shown/{end}": value for end, value in ends.items()}
    view.show({**iteration(0, 1.0), **EVALUATED, "guard/shown": 0.85, **bands})
    lines = screen.lines
    view.close()
    assert any(" ".join(line.split()).endswith(f" {shown}") for line in lines)


@pytest.mark.parametrize(("columns", "rows"), [(20, 6), (40, 10), (60, 24), (100, 5), (200, 50)])
def test_it_fits_every_terminal(columns: int, rows: int, now: Seconds, monkeypatch: pytest.MonkeyPatch):
    screen = Screen(columns, rows)
    view = view_on(screen, now, monkeypatch)
    for number in range(4):
        many = {f"reward/a_reward_with_a_long_name_{index}/mean": 0.5 for index in range(12)}
        view.show({**iteration(number, 1.0), **many, **EVALUATED})
        write_line(f"line {number}")
    lines = screen.lines
    view.close()
    assert len([line for line in lines if line.startswith("train 4/10")]) == 1, "an older view was left"
    assert lines[-1].startswith("33.4 images/s"[: min(columns - 1, 10)])
    assert "line 3" in lines or rows < 6, "the last line of the log stands above the view"


def test_what_others_write_comes_above_in_its_order(now: Seconds, monkeypatch: pytest.MonkeyPatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    view = view_on(screen, now, monkeypatch)
    view.say("from the [bold]run[/bold]")
    write_line("from a stage")
    print("from a reward")
    print("from a library", file=sys.stderr)
    view.show(iteration(0, 1.0))
    lines = screen.lines
    view.close()
    assert lines[:4] == ["from the [bold]run[/bold]", "from a stage", "from a reward", "from a library"]
    assert sys.stderr is screen and sys.stdout is screen, "the streams are given back"
    assert not screen.screen.cursor.hidden


def test_the_cursor_stays_because_a_killed_process_could_not_bring_it_back(now, monkeypatch: pytest.MonkeyPatch):
    screen = Screen()
    view = view_on(screen, now, monkeypatch)
    view.show(iteration(0, 1.0))
    assert not screen.screen.cursor.hidden
    view.close()


def test_the_last_view_stays_and_what_follows_stands_below(now: Seconds, monkeypatch: pytest.MonkeyPatch):
    screen = Screen()
    view = view_on(screen, now, monkeypatch)
    view.show(iteration(9, 1.0))
    view.close()
    view.say("done")
    assert screen.lines[0].startswith("train 1/10") and screen.lines[-1] == "done"


def test_a_terminal_that_is_gone_costs_the_view_alone(now: Seconds, monkeypatch: pytest.MonkeyPatch):
    from rlcm_fast.terminal import guarded

    class Gone(Screen):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    screen = Gone()
    view = LiveView(Clock(0, 10, now), CONFIG, "", guarded(screen))
    view.begin()
    view.say("nobody hears this")
    view.show(iteration(0, 1.0))
    view.close()


def test_a_forked_process_does_not_draw(now: Seconds, monkeypatch: pytest.MonkeyPatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    view = view_on(screen, now, monkeypatch)
    assert sys.stderr is not screen
    live_view._forget_view()
    assert sys.stderr is screen
    view.close()


def test_it_says_that_the_network_compiles_until_it_has(now: Seconds, monkeypatch: pytest.MonkeyPatch):
    screen = Screen()
    view = view_on(screen, now, monkeypatch, note="compiling")
    assert "iteration 1 since 0:00, compiling" in screen.lines[-1]
    view.show(iteration(0, 1.0))
    assert "compiling" not in screen.lines[-1]
    view.close()


def test_without_unicode_bars_are_ascii():
    class Latin(Screen):
        encoding = "latin-1"  # pyright: ignore[reportAssignmentType]

    screen = Latin()
    view = LiveView(Clock(0, 10), CONFIG, file=screen)
    for number in range(8):
        view.show(iteration(number, float(number)))
    Console(file=screen, force_terminal=True, width=100, height=24).print(view)
    assert "_.,-~=*^" in "\n".join(screen.lines)
    assert all(line.isascii() for line in screen.lines)


def test_sparks_go_from_the_lowest_to_the_highest():
    assert sparkline([3.0, 3.0]) == "\u2581\u2581"
    assert sparkline([0.0, 7.0, 3.5], "01234567") == "074"
    assert len(sparkline([random.random() for _ in range(99)])) == 20


@pytest.mark.parametrize(
    ("wanted", "variables", "is_terminal", "expected"),
    [
        ("auto", {}, True, True),
        ("auto", {}, False, False),
        ("auto", {"CI": "true"}, True, False),
        ("auto", {"NO_COLOR": "1"}, True, False),
        ("auto", {"TERM": "dumb"}, True, False),
        (True, {"CI": "true"}, False, True),
        (False, {}, True, False),
    ],
)
def test_where_it_is_shown(wanted, variables, is_terminal, expected, monkeypatch: pytest.MonkeyPatch):
    screen = Screen()
    monkeypatch.setattr(screen, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    assert is_live(wanted) is expected


def test_the_tracker_shows_it_from_the_first_iteration_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    tracker = Tracker(tmp_path, Config(tracking=TrackingConfig(tensorboard=False, live=True), num_iterations=5), 0)
    tracker.say("before the view")
    assert screen.lines == ["before the view"]
    tracker.begin(64)
    tracker.log(iteration(0, 1.0))
    tracker.close()
    assert screen.lines[:2] == ["before the view", "first iteration: number 1 of 5, 64 images"]
    assert screen.lines[2].startswith("train 1/5")


def test_plain_lines_come_every_ten_seconds_and_at_both_ends(now: Seconds, capsys: pytest.CaptureFixture[str]):
    lines = PlainLines(0, 10, now)
    lines.begin()
    for number in range(10):
        now.value += 4.0
        lines.show(iteration(number, 1.0))
    lines.show({"iteration": 10, **EVALUATED})
    shown = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert shown == [f"iteration {number} of 10" for number in (1, 4, 7, 10)]


def test_time_left_is_at_the_pace_of_this_start(now: Seconds):
    clock = Clock(4, 10, now)
    now.value = 5.0
    clock.begin()
    assert clock.left is None
    now.value = 15.0
    clock.step()
    now.value = 18.0
    assert (clock.gone, clock.of_iteration, clock.left) == (13.0, 3.0, 5 * 10.0 - 3.0)


def test_durations():
    assert [duration(seconds) for seconds in (0, 59.6, 3599, 7507)] == ["0:00", "1:00", "59:59", "2:05:07"]
