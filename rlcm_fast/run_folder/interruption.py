"""Stops a run at the next point where nothing gets lost: on Ctrl-C, SIGTERM, SIGHUP, a file, or a dead launcher.

Python runs a signal handler only between two steps of the main thread. That thread may be blocked for minutes, by a
reward or by another process. So a watching thread hears of each signal, too, and the second Ctrl-C ends the process
from there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from rlcm_fast import parallel
from rlcm_fast.terminal import write_line

_SAME_CTRL_C = 1.0  # seconds within which one Ctrl-C may arrive twice, from the terminal and from a launcher
_WATCH_SECONDS = 1.0  # between two looks at the launcher
_STDERR = 2  # file descriptor
_INTERRUPTED = 130  # exit code of a second Ctrl-C
_LAUNCHERS = {
    *("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run"),
    *("accelerate", "accelerate.commands.launch", "mpirun", "mpiexec", "orted", "hydra_pmi_proxy", "slurmstepd:"),
}


class Interrupted(Exception):
    """A stop at a safe point after a request; the present iteration has not changed the weights."""


class StoppedByGuard(Interrupted):
    """A stop at weights that a guard rejects (guard.action: stop)."""


class Interruption:
    """A context in which SIGINT, SIGTERM, SIGHUP or the death of the launcher ask the run to stop.

    A second Ctrl-C ends the process at once, whatever it waits for. A second SIGTERM does not: launchers send one after
    the Ctrl-C that the process received from the terminal. SIGHUP stays ignored if it was, as under nohup. In a program
    that the process belongs to (may_exit false), the second Ctrl-C raises KeyboardInterrupt instead. Outside of the
    main thread Python allows no signal handlers, so only the file stops such a run.

    The first signal is answered in one line that says what happens next. After the last iteration nothing is left to be
    stopped but the wait for a person: set `is_training` to false then.

    Several processes must agree where to stop. So `check` (between micro-batches) only acts if there is one process,
    and `agreed` (between iterations, on all ranks) works with any number.
    """

    def __init__(self, stop_file: Path, may_exit: bool = True) -> None:
        """stop_file: create it to stop the run if a signal would not leave enough time to save."""
        self._stop_file, self._may_exit = stop_file, may_exit
        self.is_training = True  # until the last iteration is saved
        self._requested_at: float | None = None
        self._answering: threading.Thread | None = None  # writes what the first signal leads to
        self._insists, self._raised = False, False  # a second Ctrl-C came, and what it asks for is done
        self._previous: dict[int, Any] = {}
        self._launchers = launchers_of_this_process()
        self._leaving = contextlib.ExitStack()

    def __enter__(self) -> Interruption:
        if parallel.is_main():
            self._stop_file.unlink(missing_ok=True)  # an earlier start's
        if threading.current_thread() is not threading.main_thread():
            return self

        # Let the main thread note a request, and let a thread of its own hear of every signal.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        previous_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(receiver,), name="interruption", daemon=True)
        watcher.start()

        # Undo it in the reverse order: closing the sender ends the thread.
        self._leaving.callback(receiver.close)
        self._leaving.callback(watcher.join)
        self._leaving.callback(sender.close)
        self._leaving.callback(signal.set_wakeup_fd, previous_fd)
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.close()
        if self._answering:
            self._answering.join(_SAME_CTRL_C)  # a terminal may be stopped
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted if a stop was requested and this is the only process."""
        if self._requested_at is not None and parallel.world_size() == 1:
            raise Interrupted

    def agreed(self) -> bool:
        """Tells whether any process received a request or sees the file; every rank must call."""
        return parallel.any_rank(self._requested_at is not None or self._stop_file.exists())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._insists and not self._raised:
            self._raised = True
            raise KeyboardInterrupt
        if self._requested_at is None:
            self._requested_at = time.monotonic()

    def _watch(self, receiver: socket.socket) -> None:
        """Hears of signals until the sender closes, and looks after the launcher in between."""
        receiver.settimeout(_WATCH_SECONDS)
        while True:
            try:
                received = receiver.recv(64)
            except TimeoutError:
                self._look_after_launchers()
                continue
            if not received:
                return
            for number in received:
                self._hear(number)

    def _hear(self, number: int) -> None:
        requested_at = self._requested_at
        self._answer(number)
        if requested_at is None:
            if number in self._previous:
                self._requested_at = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - requested_at > _SAME_CTRL_C:
            self._end_at_once()

    def _answer(self, number: int) -> None:
        """Says once what happens, unless the terminal is gone; another thread writes, so that this one goes on."""
        if self._answering or number not in self._previous or number == signal.SIGHUP or not parallel.is_main():
            return
        self._answering = threading.Thread(target=write_line, args=(self.answer(number),), daemon=True)
        self._answering.start()

    def answer(self, number: int) -> str:
        """Returns what a first signal leads to, in a line."""
        if self.is_training:
            moved = "after this evaluation or micro-batch, or after this iteration if its weights have moved"
            when = moved if parallel.world_size() == 1 else "after this iteration"
            what = f"stopping {when}; a checkpoint is saved"
            again = "ends the process at once, without a checkpoint"
        else:
            what = "the trained weights are saved; the run ends after its last evaluation and its export"
            again = "ends the process at once"
        again = again if self._may_exit else "raises KeyboardInterrupt"
        return f"{signal.Signals(number).name}: {what}; a second Ctrl-C {again}"

    def _end_at_once(self) -> None:
        if self._may_exit:
            lost, saved = "the iterations since the last checkpoint are lost", "the trained weights are saved"
            _tell(f"interrupted; {lost if self.is_training else saved}")
            os._exit(_INTERRUPTED)  # no other way ends a thread that is blocked in a library
        if not self._insists:
            self._insists = True
            # Once more: the handler may have run before this thread heard, and another thread may have got the signal.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _look_after_launchers(self) -> None:
        if self._requested_at is None and not all(map(_is_alive, self._launchers)):
            self._requested_at = time.monotonic()
            _tell("the launcher has died: this process stops with a checkpoint")


def launchers_of_this_process() -> Sequence[psutil.Process]:
    """Returns the parent and its parents, as long as they are launchers of processes; none for a usual start.

    The DeepSpeed launcher has two processes on a machine, and a run must not go on when either is killed.
    """
    if "LOCAL_RANK" not in os.environ:
        return []
    found = []
    with contextlib.suppress(psutil.Error):
        for parent in psutil.Process().parents():
            if not _LAUNCHERS & {Path(word).name for word in parent.cmdline()[:4]}:
                break
            found.append(parent)
    return found


def _tell(message: str) -> None:
    """Writes a line to stderr without Python's buffers, whose locks the main thread may hold."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(_STDERR, f"\n{message}\n".encode())


def _is_alive(process: psutil.Process) -> bool:
    """Tells whether the process runs; one that was killed is a zombie until its own parent looks."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


# A worker process that reads images inherits the descriptor: a signal to it would look like one to this process.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
