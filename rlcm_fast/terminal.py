"""Writes lines to stderr, above a progress bar or a live view; without a terminal they are lost and the run goes on.

The live view (run_folder/live_view.py) takes sys.stderr over while it is shown, so lines reach it by themselves.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm


class _Guarded(io.TextIOBase):
    """A stream whose loss (a closed terminal, a pipe without a reader) costs the lines and not the run."""

    def __init__(self, stream: Callable[[], TextIO]) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:
        return self._stream().encoding or "ascii"

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream().flush()

    def fileno(self) -> int:
        return self._stream().fileno()

    def isatty(self) -> bool:
        return self._stream().isatty()


def guarded(stream: TextIO) -> io.TextIOBase:
    """Returns a stream that writes to this one and goes on without it if it is lost."""
    return _Guarded(lambda: stream)


TERMINAL = _Guarded(lambda: sys.stderr)  # one object, because tqdm compares files to find the bar that it writes above


def write_line(message: str) -> None:
    """Writes a line to stderr."""
    tqdm.write(message, file=TERMINAL)
