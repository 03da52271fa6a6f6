"""The one door of train.py and of all tools: whatever is raised inside becomes one line on stderr and an exit code.

    0    done
    1    training had begun, or the machine or a reward failed (a Fault, no memory, a full disk)
    2    a mistake of the user, or whatever else ends a command before training has begun
    130  interrupted

Rooms word their errors themselves, as a ValueError or a Fault; those lines pass through unchanged. An error of a
library, which no room has worded, is named with the place that it comes from and with how to report it. With `--debug`
the traceback of what was raised first stands above the line; a chain of tracebacks is never printed.

It imports nothing heavy, so a mistake in a command costs no import of torch.
"""

from __future__ import annotations

import contextlib
import dis
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlcm_fast.faults import Fault, SharedMistake, in_one_line, origin_of, root_of, summary_of

REPORT = "nobody foresaw this: please report it, as docs/reliability.md says"
_OF_THE_MACHINE = {
    errno.ENOSPC: "the disk is full; free some space, or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space, or write elsewhere",
    errno.EIO: "the disk does not answer; look at its health, or write elsewhere",
}
_OF_PATHS = {
    errno.ENOENT: "is not there; give a path that exists",
    errno.EACCES: "may not be opened by you; change its rights, or give another",
    errno.EPERM: "may not be opened by you; change its rights, or give another",
    errno.EROFS: "is on a disk that is read-only; give another",
    errno.EISDIR: "is a folder, where a file is needed; give a file",
    errno.ENOTDIR: "goes through a file, where a folder is needed; give another",
    errno.EEXIST: "is there already; remove it, or give another",
    errno.ENAMETOOLONG: "is too long for a path (255 bytes a name, 4,096 in all); give a shorter one",
    errno.ELOOP: "is a link that leads back to itself; give another",
    errno.ENOTEMPTY: "is a folder that is not empty; give another",
}


class Words(Protocol):
    """What a run knows beyond this file: which of its errors it foresaw, and where it keeps a traceback."""

    def foreseen(self, error: BaseException) -> str | None:
        """Returns what happened and the way out of an error that no room has worded; None if nobody knows."""
        ...

    def kept(self, error: BaseException) -> str:
        """Keeps the traceback of an error that nobody foresaw; returns the words that name the file, or ""."""
        ...


@dataclass
class Door:
    """Turns what a command raises into one line and an exit code; the command moves the fields as it goes on."""

    rank: int = 0
    speaks: bool = True  # False on processes whose mistakes another one prints
    debug: bool = False
    has_begun: bool = False  # training; from then on the exit code is 1
    words: Words | None = None  # of a run

    def lead(self, work: Callable[[], int]) -> int:
        """Returns the exit code of the work, or of what it raises, which it prints."""
        try:
            code = work()
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader of the output, such as head, has what it wanted
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt:
            if self.rank == 0:
                _print("interrupted")
            return 130
        except Exception as error:  # noqa: BLE001 (the user gets one line, whatever it is)
            return self._end(error)

    def _end(self, error: Exception) -> int:
        """Prints the error and returns the exit code."""
        is_worded = isinstance(error, Fault) or is_worded_by_us(error)
        foreseen = self.words.foreseen(error) if self.words and not is_worded else None
        if self.debug and self.speaks:
            root = root_of(error)
            traceback.print_exception(type(root), root, root.__traceback__, chain=False)
        is_of_all = isinstance(error, SharedMistake) or (isinstance(error, Fault) and error.is_on_all_processes)
        if self.speaks and (self.rank == 0 or not is_of_all):
            _print(f"error: {self._line(error, foreseen)}" + (f" (rank {self.rank})" if self.rank else ""))
        is_failure = foreseen is not None or isinstance(error, Fault) or of_the_machine(error) is not None
        return 1 if self.has_begun or is_failure else 2

    def _line(self, error: Exception, foreseen: str | None) -> str:
        happened = foreseen or worded(error)
        if happened is None:
            kept = "" if self.words is None or self.debug else self.words.kept(error)
            happened = f"{summary_of(error)} (at {origin_of(error)}{kept}); {REPORT}"
        return in_one_line("; ".join([happened, *getattr(error, "__notes__", [])]))  # a run notes what it saved


def worded(error: BaseException) -> str | None:
    """Returns what happened and the way out, if a room or the kind of the error says it; None for other errors."""
    if isinstance(error, Fault) or is_worded_by_us(error):
        return str(error)
    machine = of_the_machine(error)
    if machine is not None:
        return machine
    if isinstance(error, OSError) and error.filename is not None and error.errno in _OF_PATHS:
        return f"{os.fsdecode(error.filename)} {_OF_PATHS[error.errno]}"
    return None


def of_the_machine(error: BaseException) -> str | None:
    """Returns what happened and the way out, if the machine has no room; None for other errors."""
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return _OF_THE_MACHINE[error.errno]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without an import
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return f"out of memory ({said}); ask for less at once: fewer or smaller images, smaller batches"
    return None


def is_worded_by_us(error: BaseException) -> bool:
    """Tells whether a line `raise` of rlcm_fast made the error: its message is enough, and says the way out."""
    if not isinstance(error, ValueError | Fault):
        return False
    frame, trace = None, error.__traceback__
    while trace is not None:
        frame, trace = trace, trace.tb_next
    if frame is None:
        return False
    # Compare module names, because the files of rlcm_fast.kernels are in another folder; run as a script, train.py is
    # __main__. A line of ours that calls int("x") raises no error of ours.
    module = str(frame.tb_frame.f_globals.get("__name__", ""))
    is_own = module.partition(".")[0] == "rlcm_fast" or frame.tb_frame.f_globals.get("__package__") == "rlcm_fast"
    return is_own and dis.opname[frame.tb_frame.f_code.co_code[frame.tb_lasti]] == "RAISE_VARARGS"


def take_debug(argv: Sequence[str]) -> tuple[bool, list[str]]:
    """Returns whether a command line asks for --debug, --debug true or --debug=true, and the rest of it."""
    rest, debug, arguments = [], False, list(argv)
    while arguments:
        name, has_value, value = arguments.pop(0).partition("=")
        if name != "--debug":
            rest.append(name + has_value + value)
            continue
        if not has_value and arguments and arguments[0].lower() in ("true", "false"):
            value = arguments.pop(0)
        debug = value.lower() in ("", "true")
    return debug, rest


def _print(line: str) -> None:
    from rlcm_fast.terminal import write_line

    write_line(line)
