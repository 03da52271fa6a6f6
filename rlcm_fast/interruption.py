"""Ctrl-C and SIGTERM as a wish, granted where the run can be saved without losing anything."""

from __future__ import annotations

import signal
from types import FrameType

from rlcm_fast import parallel


class Interrupted(Exception):
    """Raised at a safe point after a signal; nothing of the present iteration has touched the weights."""


class Interruption:
    """A context that catches SIGINT and SIGTERM; a second signal ends the process the usual way.

    With several processes they must agree where to stop, so `check` (between micro-batches) acts on one process only
    and `agreed` (between iterations, all ranks ask) on any number.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raises Interrupted if a signal came and this is the only process."""
        if self._requested and parallel.world_size() == 1:
            raise Interrupted

    def agreed(self) -> bool:
        """Whether any process was signalled; every rank must ask."""
        return parallel.any_rank(self._requested)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
