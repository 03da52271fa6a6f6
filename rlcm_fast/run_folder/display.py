"""What a person at the terminal sees of a run: a live view (live_view.py), or plain lines where that would do harm.

    rewards built: jpeg_compressibility, shapes_alignment
    iteration 12 of 96: total -1.018, jpeg_compressibility -1.229, shapes_alignment 0.844; 33.4 images/s; 2:42 left

Both are given the same two things: messages, and the metrics of each iteration.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Literal, Protocol

from rlcm_fast.report.measures import WIN_RATE
from rlcm_fast.terminal import write_line

Metrics = Mapping[str, float | int]
_PLAIN_SECONDS = 10.0  # between two plain lines at least: a log of a day has 9,000 of them at most


class Display(Protocol):
    """Shows a run's progress on the main process."""

    def begin(self) -> None:
        """Starts to show, when the first iteration begins."""

    def say(self, message: str) -> None:
        """Shows a line that stays."""

    def show(self, metrics: Metrics) -> None:
        """Shows the metrics of an iteration, or of the evaluation after the last one."""

    def close(self) -> None:
        """Ends; what was shown last stays."""


def is_live(wanted: bool | Literal["auto"]) -> bool:
    """Tells whether the live view is shown: `auto` needs a terminal that is no CI's and whose user wants no plain text.

    NO_COLOR (no-color.org) and TERM=dumb ask for plain text; CI is what build services set.
    """
    if wanted != "auto":
        return wanted
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("CI") or os.environ.get("TERM", "dumb") in ("dumb", "")
    return sys.stderr.isatty() and not is_plain


class Clock:
    """Tells how long a run has worked and what is left, at the pace of all it did since it began."""

    def __init__(self, first: int, total: int, now: Callable[[], float] = time.monotonic) -> None:
        """first: finished iterations of an earlier start, whose pace is not known."""
        self.first, self.total, self.done = first, total, first
        self._now, self._began, self._stepped = now, now(), now()

    def begin(self) -> None:
        self._began = self._stepped = self._now()

    def step(self) -> None:
        """Notes that an iteration is finished."""
        self.done, self._stepped = self.done + 1, self._now()

    @property
    def gone(self) -> float:
        """Seconds since the beginning."""
        return self._now() - self._began

    @property
    def of_iteration(self) -> float:
        """Seconds since the last iteration ended."""
        return self._now() - self._stepped

    @property
    def left(self) -> float | None:
        """Seconds to the end; None before an iteration is finished."""
        done = self.done - self.first
        if done == 0:
            return None
        pace = (self._stepped - self._began) / done
        return max(0.0, pace * (self.total - self.done) - self.of_iteration)


class PlainLines:
    """Prints a line for an iteration, at most every ten seconds; the first and the last have theirs in any case."""

    def __init__(
        self, first: int, total: int, now: Callable[[], float] = time.monotonic, left_out: Collection[str] = ()
    ) -> None:
        """left_out: rewards whose mean says nothing, as those of a person."""
        self._clock, self._now, self._left_out = Clock(first, total, now), now, left_out
        self._printed_at = -_PLAIN_SECONDS

    def begin(self) -> None:
        self._clock.begin()

    def say(self, message: str) -> None:
        write_line(message)

    def show(self, metrics: Metrics) -> None:
        is_iteration = "images_per_second" in metrics  # the line after the last iteration has only an evaluation
        if not is_iteration:
            return
        self._clock.step()
        is_first, is_last = self._clock.done == self._clock.first + 1, self._clock.done >= self._clock.total
        if is_first or is_last or self._now() - self._printed_at >= _PLAIN_SECONDS:
            self._printed_at = self._now()
            write_line(self._line(metrics))

    def close(self) -> None:
        pass

    def _line(self, metrics: Metrics) -> str:
        found = rewards(metrics, self._left_out)
        if WIN_RATE in metrics:
            found["win rate"] = float(metrics[WIN_RATE])
        shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        left = self._clock.left
        parts = [shown, f"{metrics['images_per_second']:.1f} images/s"]
        parts += [f"{duration(left)} left"] if left is not None else []
        return f"iteration {self._clock.done} of {self._clock.total}: {'; '.join(part for part in parts if part)}"


def rewards(metrics: Metrics, left_out: Collection[str] = ()) -> dict[str, float]:
    """Returns the mean of each trained reward but those `left_out`, totals first; with tasks a name is TASK/NAME."""
    found = {
        key.removeprefix("reward/").removesuffix("/mean"): float(value)
        for key, value in metrics.items()
        if key.startswith("reward/") and key.endswith("/mean")
    }
    shown = [item for item in found.items() if item[0] not in left_out]
    return dict(sorted(shown, key=lambda item: item[0].rpartition("/")[2] != "total"))


def duration(seconds: float) -> str:
    """Returns 1:32 or 2:05:07."""
    minutes, of_minute = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{of_minute:02d}" if hours else f"{minutes}:{of_minute:02d}"
