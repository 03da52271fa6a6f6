"""Ctrl-C, SIGTERM and a file as a wish, granted where the run can be saved without losing anything."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

from rlcm_fast import parallel

_SAME_CTRL_C = 1.0  # seconds in which one Ctrl-C may arrive more than once, from the terminal and from a launcher


class Interrupted(Exception):
    """Raised at a safe point after a signal; nothing of the present iteration has touched the weights."""


class Interruption:
    """A context that catches SIGINT and SIGTERM; a second Ctrl-C ends the process the usual way.

    A second SIGTERM does not: launchers send one after the Ctrl-C that the process has had from the terminal itself.

    With several processes they must agree where to stop, so `check` (between micro-batches) acts on one process only
    and `agreed` (between iterations, all ranks ask) on any number.
    """

    def __init__(self, stop_file: Path) -> None:
        """stop_file: whoever makes it asks for a stop, too, where no signal would leave the time to save."""
        self._stop_file = stop_file
        self._requested_at: float | None = None
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> Interruption:
        if parallel.is_main():
            self._stop_file.unlink(missing_ok=True)  # that of an earlier life
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted if a signal came and this is the only process."""
        if self._requested_at is not None and parallel.world_size() == 1:
            raise Interrupted

    def agreed(self) -> bool:
        """Whether any process was signalled or the file is there; every rank must ask."""
        return parallel.any_rank(self._requested_at is not None or self._stop_file.exists())

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested_at is None:
            self._requested_at = now
        elif number == signal.SIGINT and now - self._requested_at > _SAME_CTRL_C:
            raise KeyboardInterrupt
