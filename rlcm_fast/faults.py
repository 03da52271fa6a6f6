"""What can go wrong while a run trains and is no mistake in its config: each fault ends the run with one line.

The trainer saves the finished iterations first, if the weights are good. The exit code is 1. A mistake in the config
is a ValueError instead, and its exit code is 2.
"""

from __future__ import annotations

from typing import Self


class Fault(RuntimeError):
    """A fault of data, a reward, the machine or the numbers; its message is one line that names the way out."""

    is_on_all_processes = False  # every process raised it at the same place, so that all can save together

    def of_all(self) -> Self:
        """Notes that every process raises it at this place, and returns it."""
        self.is_on_all_processes = True
        return self


class Diverged(Fault):
    """The weights, or what they draw, are unusable: the run stops, and its last good checkpoint stays the newest."""


class SharedMistake(ValueError):
    """A mistake in the config that all processes found together; the main process alone prints it."""
