"""Waits for work that may never end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class NotDone(Exception):
    """Work did not end in time."""


def call_within(seconds: float, work: Callable[[], T]) -> T:
    """Returns what `work` returns, or raises what it raises; NotDone if it has not ended after so many seconds.

    The work runs in a daemon thread, which nobody waits for afterwards.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 (it is raised again where somebody sees it)
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="plug-in")
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise NotDone
    return results[0]
