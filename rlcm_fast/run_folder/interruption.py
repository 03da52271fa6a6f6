"""Stops a run on Ctrl-C, SIGTERM or a file, at the next point where nothing gets lost."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

from rlcm_fast import parallel

_SAME_CTRL_C = 1.0  # seconds within which one Ctrl-C may arrive twice, from the terminal and from a launcher


class Interrupted(Exception):
    """A stop at a safe point after a request; the present iteration has not changed the weights."""


class Interruption:
    """A context that catches SIGINT and SIGTERM; a second Ctrl-C ends the process the usual way.

    A second SIGTERM does not: launchers send one after the Ctrl-C that the process received from the terminal.

    Several processes must agree where to stop. So `check` (between micro-batches) only acts if there is one process,
    and `agreed` (between iterations, on all ranks) works with any number.
    """

    def __init__(self, stop_file: Path) -> None:
        """stop_file: create it to stop the run if a signal would not leave enough time to save."""
        self._stop_file = stop_file
        self._requested_at: float | None = None
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> Interruption:
        if parallel.is_main():
            self._stop_file.unlink(missing_ok=True)  # an earlier start's
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted if a signal arrived and this is the only process."""
        if self._requested_at is not None and parallel.world_size() == 1:
            raise Interrupted

    def agreed(self) -> bool:
        """Whether any process received a signal or sees the file; every rank must call."""
        return parallel.any_rank(self._requested_at is not None or self._stop_file.exists())

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested_at is None:
            self._requested_at = now
        elif number == signal.SIGINT and now - self._requested_at > _SAME_CTRL_C:
            raise KeyboardInterrupt
