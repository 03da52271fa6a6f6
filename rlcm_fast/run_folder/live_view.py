"""A live view of a run in a terminal: rewards with their trend, held-out values with their band, speed, time left.

    train 48/96 ############------------ 1:49 gone, 1:32 left
    total                  -1.018  __..--~~^^  rose
    jpeg_compressibility   -1.229  _._.-.-~~^  rose
    held out               now      start     band
    shapes_alignment       0.844    0.851     0.790 to 0.912  inside
    33.4 images/s, 1.93 s an iteration, 1.2 GiB; iteration 49 since 0:01

rich draws it at the bottom of the terminal, once a second from a thread of its own; whatever else is written to stderr
or stdout, by us or by a library, comes above it, so the last line of the log stands right over it. The cursor stays
visible, because a process that is killed could not bring it back.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from rich.console import Console, ConsoleOptions, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlcm_fast.report.changes import SURE, Change, of_values
from rlcm_fast.report.measures import WIN_RATE, error_of_win_rate, name_of_diversity
from rlcm_fast.report.rewards import of_person, standard_error
from rlcm_fast.run_folder.display import Clock, Metrics, duration, rewards
from rlcm_fast.terminal import guarded

_REFRESHES_PER_SECOND = 1  # one takes 4 ms of Python; ten would slow an iteration on a CPU
_REMEMBERED = 60  # iterations of the trend
_SPARKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_ASCII_SPARKS = "_.,-~=*^"
_NARROW, _WIDE = 56, 84  # columns
_NUM_SPARKS = 20
_GIB = 2**30


class LiveView:
    """Shows the run until it is closed."""

    def __init__(self, clock: Clock, config: Mapping[str, Any], note: str = "", file: Any = None) -> None:
        """Needs the run's config by dotted names, which says how many images an evaluation has and who gives rewards.

        note: what the first iteration does beside its work; file: a text stream, stderr by default.
        """
        self._clock, self._config, self._note = clock, config, note
        self._left_out = of_person(config)
        self._trends: dict[str, list[float]] = {}
        self._start: dict[str, float] = {}  # the first evaluation
        self._metrics: dict[str, float] = {}  # the last value of each key
        # What is drawn; replaced as a whole, because another thread may be drawing it.
        self._trained: list[_Trained] = []
        self._held_out: list[list[Text]] = []
        self._pace = self._speed()
        self._file: Any = file or guarded(sys.stderr)
        self._live: Live | None = None
        self._is_over = False

    def begin(self) -> None:
        """Takes the bottom of the terminal."""
        global _streams
        self._clock.begin()
        console = Console(file=self._file, force_terminal=True, highlight=False)
        _streams = sys.stdout, sys.stderr
        self._live = Live(self, console=console, refresh_per_second=_REFRESHES_PER_SECOND, vertical_overflow="crop")
        self._live.start(refresh=True)
        console.show_cursor(True)

    def say(self, message: str) -> None:
        """Prints a line above the view, or where the view will be."""
        if self._live is None:
            print(message, file=self._file, flush=True)
        else:
            self._live.console.print(Text(message), soft_wrap=True)

    def show(self, metrics: Metrics) -> None:
        """Takes the metrics of an iteration over; the next refresh shows them."""
        values = {key: float(value) for key, value in metrics.items()}
        self._metrics |= values
        if not self._start:
            self._start = {key: value for key, value in values.items() if key.startswith("eval/")}
        if "images_per_second" in metrics:
            self._clock.step()
            self._note = ""
            for name, value in rewards(metrics, self._left_out).items():
                self._trends[name] = [*self._trends.get(name, []), value][-_REMEMBERED:]
        self._trained = [_Trained(name, values, of_values(values)) for name, values in self._trends.items()]
        self._held_out, self._pace = self._held_out_rows(), self._speed()
        if self._live:
            self._live.refresh()

    def close(self) -> None:
        """Leaves the last view where it is and gives the terminal back."""
        global _streams
        if self._live:
            self._is_over = True
            self._live.stop()
            self._live, _streams = None, None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        """Draws for the width and height that the terminal has now."""
        width = options.max_width
        is_unicode = options.encoding.startswith("utf")
        room = max(1, console.height - 4)
        trained = [row.cells(_SPARKS if is_unicode else _ASCII_SPARKS) for row in self._trained]
        held_out = self._held_out
        name_width = min(width // 2, max((len(row[0]) for row in [*trained, *held_out]), default=0))
        num_trained = min(len(trained), max(1, room - min(len(held_out) + 1, room // 2)))
        shown = [self._progress(width)]
        if trained:
            shown.append(_table(trained[:num_trained], ("reward", "now", "trend", ""), width, name_width))
        left = room - num_trained - 1
        if held_out and left > 1:
            shown.append(_table(held_out[: left - 1], ("held out", "now", "start", "band"), width, name_width))
        yield Group(*shown, Text(self._pace + self._doing(), no_wrap=True, overflow="ellipsis"))

    def _progress(self, width: int) -> Table:
        clock = self._clock
        left = "" if clock.left is None else f", {duration(clock.left)} left"
        times = Text(f"{duration(clock.gone)} gone{left}" if width >= _NARROW else left[2:], no_wrap=True)
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=max(1, clock.total), completed=clock.done)
        line.add_row(Text(f"train {clock.done}/{clock.total}", style="bold"), bar, times)
        return line

    def _held_out_rows(self) -> list[list[Text]]:
        rows = []
        for key, start in self._start.items():
            if key.endswith("/mean"):
                name = key.removeprefix("eval/").removesuffix("/mean")
                rows.append(_held_out_row(name, self._metrics[key], start, self._band(name, start)))
            elif key.endswith("/diversity"):
                rows.append(_held_out_row(name_of_diversity(key), self._metrics[key], start, None))
        if WIN_RATE in self._metrics:
            reach = SURE * error_of_win_rate(self._metrics["rating/compared"])
            by_chance = max(0.0, 0.5 - reach), min(1.0, 0.5 + reach)
            rows.append(_held_out_row("win rate", self._metrics[WIN_RATE], 0.5, by_chance))
        return rows

    def _band(self, name: str, start: float) -> tuple[float, float] | None:
        """Returns the band of a guard of this name; else two standard errors around the start; None without either."""
        low, high = (self._metrics.get(f"guard/{name}/{end}") for end in ("low", "high"))
        if low is not None or high is not None:
            return -math.inf if low is None else low, math.inf if high is None else high
        error = standard_error(self._config, self._start, f"eval/{name}")
        return None if error is None else (start - SURE * error, start + SURE * error)

    def _speed(self) -> str:
        parts = []
        if "images_per_second" in self._metrics:
            parts.append(f"{self._metrics['images_per_second']:.1f} images/s")
        if "seconds/iteration" in self._metrics:
            parts.append(f"{self._metrics['seconds/iteration']:.2f} s an iteration")
        gib = self._metrics.get("memory/peak_gib", psutil.Process().memory_info().rss / _GIB)
        return ", ".join([*parts, f"{gib:.1f} GiB"])

    def _doing(self) -> str:
        clock, note = self._clock, f", {self._note}" if self._note else ""
        if self._is_over or clock.done >= clock.total:
            return ""
        return f"; iteration {clock.done + 1} since {duration(clock.of_iteration)}{note}"


@dataclass(frozen=True)
class _Trained:
    """A row of the trained rewards."""

    name: str
    values: Sequence[float]
    change: Change | None

    def cells(self, sparks: str) -> list[Text]:
        word = self.change.word if self.change and self.change.standard_error is not None else ""
        style = {"rose": "green", "fell": "red"}.get(word, "")
        return [
            Text(self.name),
            Text(_number(self.values[-1])),
            Text(sparkline(self.values, sparks)),
            Text(word, style=style),
        ]


def sparkline(values: Sequence[float], sparks: str = _SPARKS) -> str:
    """Returns the last values as a line of bars from the lowest to the highest of them."""
    shown = list(values)[-_NUM_SPARKS:]
    low, high = min(shown), max(shown)
    if not low < high:
        return sparks[0] * len(shown)
    return "".join(sparks[min(len(sparks) - 1, int((value - low) / (high - low) * len(sparks)))] for value in shown)


def _held_out_row(name: str, now: float, start: float, band: tuple[float, float] | None) -> list[Text]:
    text = Text(_ends(*band)) if band else Text("")
    if band:
        is_inside = band[0] <= now <= band[1]
        text.append("inside" if is_inside else "outside", style="" if is_inside else "yellow")
    return [Text(name), Text(_number(now)), Text(_number(start)), text]


def _table(rows: Sequence[Sequence[Text]], titles: Sequence[str], width: int, name_width: int) -> Table:
    """Returns the rows as far as they fit: a narrow terminal has no third column, and no fourth."""
    num_columns = 4 if width >= _WIDE else 3 if width >= _NARROW else 2
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="dim")
    for title in titles[:num_columns]:
        is_number, is_name = title in ("now", "start"), title == titles[0]
        table.add_column(
            title,
            no_wrap=True,
            overflow="ellipsis",
            justify="right" if is_number else "left",
            min_width=name_width if is_name else 8 * is_number,
        )
    for row in rows:
        table.add_row(*row[:num_columns])
    return table


def _ends(low: float, high: float) -> str:
    """Returns the ends of a band, of which one may be infinite, as text."""
    if math.isinf(high):
        return f"at least {_number(low)} "
    return f"at most {_number(high)} " if math.isinf(low) else f"{_number(low)} to {_number(high)} "


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


# A process that is forked while the view is shown, as one that reads images, must not draw it.
_streams: tuple[Any, Any] | None = None


def _forget_view() -> None:
    if _streams:
        sys.stdout, sys.stderr = _streams


os.register_at_fork(after_in_child=_forget_view)
