"""Writes lines to stderr, above the progress bar; if the terminal is gone, the lines are lost and the run goes on."""

from __future__ import annotations

import contextlib
import io
import sys

from tqdm import tqdm


class _Terminal(io.TextIOBase):
    """Stderr, whose loss (a closed terminal, a pipe without a reader) costs the lines and not the run."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def fileno(self) -> int:
        return sys.stderr.fileno()

    def isatty(self) -> bool:
        return sys.stderr.isatty()


TERMINAL = _Terminal()  # one object, because tqdm compares files to find the bar that it writes above


def write_line(message: str) -> None:
    """Writes a line to stderr."""
    tqdm.write(message, file=TERMINAL)
