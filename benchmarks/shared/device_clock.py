"""Seconds of the device in calls of a running trainer, without a wait between them.

On a GPU events stand in its stream before and after each call, and are read when the work is done: gaps in which the
GPU waits for launches count, and the host does not wait for the GPU at a stage's end. On a CPU it is the clock.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch


class DeviceClock:
    """`read` gives and clears what was measured since the last call."""

    def __init__(self) -> None:
        self._marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def wrap(self, owner: Any, method: str, stage: str) -> None:
        """Every call of owner.method counts for `stage`."""
        function: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            start = _mark()
            result = function(*arguments, **keywords)
            self._marks[stage].append((start, _mark()))
            return result

        setattr(owner, method, timed)

    def read(self) -> dict[str, float]:
        """Seconds of each stage; call it when the device has done all that it was given."""
        marks, self._marks = self._marks, defaultdict(list)
        return {stage: sum(_seconds(*pair) for pair in pairs) for stage, pairs in marks.items()}


def _mark() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
