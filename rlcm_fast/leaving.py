"""Ends a process whose reward workers may still compute.

They are daemon threads (rewards/workers.py). When Python ends, it takes such a thread down at its next step; if that is
inside of torch, the process aborts with "terminate called without an active exception" and the exit code -6.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading

WORKER = "reward_"  # how the names of the threads begin


def leave_at_once_if_computing(code: int) -> None:
    """Ends the process with this exit code, without Python's own farewell, if a reward worker is still there."""
    if not any(thread.name.startswith(WORKER) for thread in threading.enumerate()):
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
