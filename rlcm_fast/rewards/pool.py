"""Daemon threads that run calls and keep their order; Python does not wait for them when it ends.

A ThreadPoolExecutor would hold up the end of a run until its last call, which may wait for a dead server, is back.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class DaemonPool:
    """At most `num_threads` calls at a time, whoever submits them; the threads start with the first calls."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._waiting: queue.SimpleQueue[tuple[Callable[[], object], Future]] = queue.SimpleQueue()

    def run(self, calls: Iterable[Callable[[], T]]) -> list[T]:
        """Runs all calls and returns what they return, in order; raises the first exception, in order, at the end."""
        futures = [self._submit(call) for call in calls]
        for future in futures:
            future.exception()
        return [future.result() for future in futures]

    def _submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._waiting.put((call, future))
        with self._lock:
            if len(self._threads) < self._num_threads:
                thread = threading.Thread(target=self._serve, name=f"{self._name}_{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def _serve(self) -> None:
        while True:
            call, future = self._waiting.get()
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - whoever waits for the call gets it
                future.set_exception(error)
            del call, future  # they hold images
