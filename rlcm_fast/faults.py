"""What can go wrong while a run trains and is no mistake in its config: each fault ends the run with one line.

The trainer saves the finished iterations first, if the weights are good. The exit code is 1. A mistake in the config
is a ValueError instead, and its exit code is 2. The functions below put any error into one line, for all rooms.
"""

from __future__ import annotations

import traceback
from pathlib import Path
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


_LONGEST = 2000  # characters of a line; the way out stands at its end
_OURS = "rlcm_fast"


def in_one_line(text: object, most: int = _LONGEST) -> str:
    """Returns a text without line breaks and control characters; of a long one, its beginning and its end."""
    plain = " ".join(str(text).split())
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in plain)
    return shown if len(shown) <= most else f"{shown[: most * 2 // 3]} ... {shown[-most // 3 :]}"


def summary_of(error: BaseException) -> str:
    """Returns the type of an error and what it says, in one line."""
    said = in_one_line(error, 300)
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def root_of(error: BaseException) -> BaseException:
    """Returns the error that the others of its chain were raised for."""
    seen = [error]
    while (earlier := _earlier(seen[-1])) is not None and earlier not in seen:
        seen.append(earlier)
    return seen[-1]


def origin_of(error: BaseException) -> str:
    """Says where an error comes from: the last line of ours that ran, and the line of another package that raised.

    It looks like "rlcm_fast/build.py:120, in diffusers/loaders/single_file.py:33".
    """
    frames = list(traceback.walk_tb(root_of(error).__traceback__)) or list(traceback.walk_tb(error.__traceback__))
    places = [(str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename, line) for frame, line in frames]
    own = [place for place in places if place[0].partition(".")[0] == _OURS]
    last = [*own[-1:], *(place for place in places[-1:] if place not in own[-1:])]
    return ", in ".join(f"{_short(file)}:{line}" for _, file, line in last)


def _earlier(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _short(file: str) -> str:
    """Returns a file's path from its package on; elsewhere its folder and its name."""
    parts = Path(file).parts
    for root in ("site-packages", "dist-packages"):
        if root in parts:
            return "/".join(parts[parts.index(root) + 1 :])
    if _OURS in parts:
        return "/".join(parts[len(parts) - 1 - parts[::-1].index(_OURS) :])
    return "/".join(parts[-2:])
