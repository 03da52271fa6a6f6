"""Keeps models of rewards in the CPU's memory while the UNet trains (offload: true).

    rollout, evaluation:   with offloading.in_use(): sample, decode, score, gather

A network of the pack never changes, so a copy of it stays in the CPU's memory (frozen.py). Networks that
rewards share move once, and are offloaded if one of these rewards asks for it. A reward of yours moves its own models,
by the methods of `Movable`. On a CPU nothing moves.

Models go to the GPU in the stream of the rollout, which the workers' streams wait for before they score, and leave it
after the last score has arrived. This was not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Movable(Protocol):
    """Models that can leave the GPU; both methods are called by the main thread while no reward computes."""

    def to_device(self) -> None:
        """Moves the models to the GPU; they may be there."""
        ...

    def to_cpu(self) -> None:
        """Moves the models to the CPU's memory; they may be there."""
        ...


class Offloading:
    """All models of a process that are on the GPU only while rewards compute."""

    def __init__(self, models: Iterable[Movable] = ()) -> None:
        """Moves the models off the GPU."""
        self._models = list(models)
        self._to_cpu()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The models are on the GPU inside.

        After an exception they stay there: a reward may still compute, and the run ends.
        """
        for model in self._models:
            model.to_device()
        yield
        self._to_cpu()

    def _to_cpu(self) -> None:
        for model in self._models:
            model.to_cpu()


_noted: ContextVar[list[nn.Module] | None] = ContextVar("noted", default=None)


@contextmanager
def networks_used() -> Iterator[list[nn.Module]]:
    """Yields a list that fills with the networks that rewards built inside load or share (towers.py)."""
    networks: list[nn.Module] = []
    token = _noted.set(networks)
    try:
        yield networks
    finally:
        _noted.reset(token)


def note(networks: Iterable[nn.Module]) -> None:
    """Notes networks for the innermost `networks_used`, if there is one."""
    noted = _noted.get()
    if noted is not None:
        noted.extend(networks)
