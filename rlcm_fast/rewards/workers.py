"""Runs calls of rewards in worker threads, and waits for them in short slices.

The threads are daemons, which Python does not wait for when it ends (leaving.py); those of a ThreadPoolExecutor would
hold up a run for as long as a reward hangs. While the main thread waits, signals and `may_stop` get their turn, a line
says every HEARTBEAT_SECONDS what it waits for, and a call that takes longer than the timeout ends the wait.
"""

from __future__ import annotations

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from rlcm_fast import parallel
from rlcm_fast.leaving import WORKER
from rlcm_fast.terminal import write_line
from rlcm_fast.trajectory import Prompt

HEARTBEAT_SECONDS = 60.0
_SLICE_SECONDS = 0.1  # how often a wait looks up
_FAREWELL_SECONDS = 1.0  # how long shutdown waits for calls that have begun


class Call:
    """The work of one reward on one micro-batch, from its submission to its answer."""

    def __init__(self, reward_name: str, prompts: Sequence[Prompt], work: Callable[[Call], object]) -> None:
        """work: takes this object, so that it can note its attempts; what it returns or raises is the answer."""
        self.reward_name = reward_name
        self.prompts = tuple(prompts)
        self.answer: concurrent.futures.Future[object] = concurrent.futures.Future()
        self.attempt: tuple[float, Prompt] | None = None  # of the reward's call that runs now: since when, first prompt
        self._work: Callable[[Call], object] | None = work

    def begins(self, first: Prompt) -> None:
        """Notes that the reward is called now, with images of which `first` is the first prompt."""
        self.attempt = (time.monotonic(), first)

    def run(self) -> None:
        """Does the work, unless it was cancelled, and lets go of the images."""
        work, self._work = self._work, None
        if work is None or not self.answer.set_running_or_notify_cancel():
            return
        self.begins(self.prompts[0])
        try:
            returned = work(self)
        except BaseException as error:  # noqa: BLE001  # whoever reads the answer gets it
            self.attempt = None
            # A reward's sys.exit() must not end the run without a word; contextlib has a meaning for StopIteration.
            is_exit = not isinstance(error, Exception) or isinstance(error, StopIteration)
            self.answer.set_exception(RuntimeError(f"{type(error).__name__}: {error}") if is_exit else error)
        else:
            self.attempt = None
            del work  # and with it the images, before anybody hears that there is room for others
            self.answer.set_result(returned)

    def cancel(self) -> None:
        """Drops the work and its images, if it has not begun."""
        if self.answer.cancel():
            self._work = None

    def seconds(self) -> float:
        """How long the reward's call has been running; 0 if none is."""
        return time.monotonic() - self.attempt[0] if self.attempt else 0.0


class Workers:
    """Threads that run calls in the order of submission; they start with the first call."""

    def __init__(self, num_workers: int, timeout: float = 0.0) -> None:
        """timeout: seconds that a call of a reward may take; 0 is off."""
        if num_workers < 1:
            raise ValueError(f"rollout.reward_workers={num_workers} must be at least 1")
        self.timeout = timeout
        self.overdue: tuple[str, Prompt] | None = None  # reward and prompt of the first call beyond the timeout
        self._waiting: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"{WORKER}{number}", daemon=True) for number in range(num_workers)
        ]
        self._unanswered: list[Call] = []  # in the order of submission
        self._is_closed = False

    def submit(self, call: Call) -> None:
        """Queues a call; drops it if an earlier call is overdue, because then the rollout fails anyway."""
        if self._is_closed or self.overdue:
            call.cancel()
            return
        if not self._threads[0].ident:
            for thread in self._threads:
                thread.start()
        self._unanswered.append(call)
        self._waiting.put(call)

    def wait(
        self, calls: Sequence[Call], is_enough: Callable[[], bool], may_stop: Callable[[], None] = lambda: None
    ) -> float:
        """Waits until `is_enough`, which must come true at the latest with the last of `calls`, or a call is overdue.

        may_stop: is called now and then while this waits, and may raise. Returns the seconds.
        """
        began = time.monotonic()
        next_line = began + HEARTBEAT_SECONDS
        while not is_enough() and not self._is_overdue():
            pending = [call.answer for call in calls if not call.answer.done()]
            concurrent.futures.wait(pending, _SLICE_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED)
            may_stop()
            if time.monotonic() >= next_line:
                next_line += HEARTBEAT_SECONDS
                _say(_progress(calls, time.monotonic() - began))
        return time.monotonic() - began

    def shutdown(self) -> None:
        """Drops the calls that have not begun and waits a second for the others; says so if one does not come back."""
        if self._is_closed:
            return
        self._is_closed = True
        for call in self._unanswered:
            call.cancel()
        started = [thread for thread in self._threads if thread.ident]
        for _ in started:
            self._waiting.put(None)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        for thread in started:
            thread.join(max(0.0, deadline - time.monotonic()))
        for call in self._unanswered:
            if not call.answer.done():
                _say(
                    f"reward {call.reward_name!r} has not answered for {call.seconds():.0f} s; the run ends without it"
                )

    def _serve(self) -> None:
        for call in iter(self._waiting.get, None):
            call.run()

    def _is_overdue(self) -> bool:
        """Tells whether a call has taken longer than the timeout, and remembers the first that has."""
        self._unanswered = [call for call in self._unanswered if not call.answer.done()]
        for call in self._unanswered:
            attempt = call.attempt
            if self.timeout and attempt and time.monotonic() - attempt[0] > self.timeout:
                self.overdue = self.overdue or (call.reward_name, attempt[1])
        return self.overdue is not None


class DecodedImages:
    """Bounds how many decoded micro-batches are in memory: those whose calls are not all answered."""

    def __init__(self, workers: Workers, limit: int) -> None:
        self._workers, self._limit = workers, limit
        self._unscored: list[list[Call]] = []  # the calls of each micro-batch

    def add(self, calls: list[Call]) -> None:
        """Notes the calls on a micro-batch."""
        self._unscored.append(calls)

    def wait_for_room(self, may_stop: Callable[[], None] = lambda: None) -> float:
        """Waits until there is room for one more; returns the seconds. Call it before you decode."""
        calls = [call for of_batch in self._unscored for call in of_batch]
        return self._workers.wait(calls, self._has_room, may_stop)

    def _has_room(self) -> bool:
        self._unscored = [calls for calls in self._unscored if not all(call.answer.done() for call in calls)]
        return len(self._unscored) < self._limit


def _progress(calls: Iterable[Call], seconds: float) -> str:
    """Says what a wait waits for: the reward of the first call without an answer."""
    calls = list(calls)
    late = next((call for call in calls if not call.answer.done()), calls[0])
    same = [call for call in calls if call.reward_name == late.reward_name]
    done = sum(len(call.prompts) for call in same if call.answer.done())
    total = sum(len(call.prompts) for call in same)
    return f"waiting for reward {late.reward_name!r} for {seconds:.0f} s: {done} of {total} images are scored"


def _say(message: str) -> None:
    """Prints a line to stderr on the process that waits, above the bar if there is one."""
    where = f" (rank {parallel.rank()})" if parallel.world_size() > 1 else ""
    write_line(message + where)
