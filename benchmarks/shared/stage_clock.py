"""Seconds of the stages of a loop, and the calls of its network, for loops of different make.

A stage stops while another runs within it, so that the stages add up to what was spent in them. On a GPU these are the
seconds of the processor that launches: a clock that waited for the device would slow loops of small operations more
than others.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

STAGES = (
    "sampling: network",
    "sampling: rest",
    "decode",
    "reward",
    "training: network",
    "training: backward",
    "training: optimizer",
    "training: rest",
)


class StageClock:
    """`read` gives and clears what was measured since the last call."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._calls: dict[str, list[int]] = defaultdict(list)  # rows of each network call
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts for `name`; a torch.profiler shows it too."""
        self._enter(name)
        with record_function(name):
            yield
        self._leave()

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Every call of owner.method counts for the stage `name`."""
        function: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.stage(name):
                return function(*arguments, **keywords)

        setattr(owner, method, timed)

    def watch(self, network: nn.Module) -> None:
        """Forward passes count as "network" of training where they have gradients, else of sampling."""

        def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            name = "training: network" if torch.is_grad_enabled() else "sampling: network"
            self._calls[name].append(len(arguments[0]))
            self._enter(name)

        network.register_forward_pre_hook(before)
        network.register_forward_hook(lambda *_: self._leave())

    def read(self) -> tuple[dict[str, float], dict[str, list[int]]]:
        """Seconds of each of STAGES, and the rows of every network call by stage."""
        seconds, calls = {name: self._seconds[name] for name in STAGES}, dict(self._calls)
        self._seconds.clear()
        self._calls.clear()
        return seconds, calls

    def _enter(self, name: str) -> None:
        self._charge()
        self._running.append(name)

    def _leave(self) -> None:
        self._charge()
        self._running.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now
