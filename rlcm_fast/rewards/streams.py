"""Lets each worker thread score on a CUDA stream of its own, beside the next micro-batch; on a CPU nothing happens.

    rollout's stream    decode -> event                          sample, decode the next ...
    worker's stream              wait for the event -> score -> copy the scores to the CPU, which only the worker awaits

Written for a GPU, not run on one yet.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# By the thread's name, not the thread: later workers of that name use the stream's cached memory again.
_streams: dict[tuple[str, torch.device], torch.cuda.Stream] = {}


def event_after(tensor: Tensor) -> torch.cuda.Event | None:
    """The event after which `tensor`, which this thread has computed, is there; None on a CPU."""
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return event


@contextmanager
def own_stream(images: Tensor, decoded: torch.cuda.Event | None) -> Iterator[None]:
    """What this thread computes inside runs on its own stream, once `images` are `decoded`; None on a CPU."""
    if decoded is None:
        yield
        return
    torch.cuda.set_device(images.device)  # a new thread starts on device 0, even if the rank uses another device
    key = (threading.current_thread().name, images.device)
    if key not in _streams:
        _streams[key] = torch.cuda.Stream(images.device)
    stream = _streams[key]
    stream.wait_event(decoded)
    images.record_stream(stream)  # else their memory could be used again before the stream has read them
    with torch.cuda.stream(stream):
        yield


@dataclass(frozen=True)
class Kept:
    """A tensor that several threads use, each on its own stream."""

    tensor: Tensor
    _event: torch.cuda.Event | None

    @staticmethod
    def of(tensor: Tensor) -> Kept:
        """Keeps a tensor that this thread has computed."""
        return Kept(tensor, event_after(tensor))

    def get(self) -> Tensor:
        """The tensor, for this thread's stream: the GPU waits for it, the host does not."""
        if self._event is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self._event)
            self.tensor.record_stream(stream)
        return self.tensor
